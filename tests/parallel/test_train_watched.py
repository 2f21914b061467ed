"""What the loop watches: spikes of the loss, parameters that differ, slow ranks and full memory."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdlm.run import node_memory, restore
from tests import helpers

TAMPERED = Path(__file__).with_name("tampered_train.py")
HOST = socket.gethostname()
QUIET = ("--eval.batches", "0", "--log.every", "1000")
SPIKING = (
    *("--train.spike_sigmas", "8", "--parallel.strategy", "fixed", "--optim.warmup_steps", "20"),
    *("--optim.lr", "1e-3", "--train.steps", "190", "--checkpoint.every", "0", *QUIET),
)


def tampered(data: Path, run: Path, *more: str) -> list[str]:
    command = helpers.train_command(data, run, *more)
    return [command[0], str(TAMPERED), *command[3:]]


def spikes(run: Path) -> list[int]:
    """The steps that updated nothing for their loss."""
    return [row["step"] for row in helpers.rows(run, "metrics.jsonl", skipped=True, spike=True)]


def state(run: Path) -> dict[str, object]:
    newest = restore.folders(run / "checkpoints")[-1]
    record: dict[str, object] = json.loads((newest / "state.json").read_text())
    return record


def test_a_spike_updates_nothing_and_a_resumed_run_has_the_same_limit(
    tiny_data: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    env = {"SPIKES": "165 167"}
    done = helpers.run([*helpers.mpirun(2), *tampered(tiny_data, whole, *SPIKING)], env=env)
    assert done.returncode == 0, done.stdout
    assert spikes(whole) == [165, 166, 167]
    assert "SKIPPED: loss spike" in done.stdout
    assert "done: 190 steps, 3 of them updated nothing" in done.stdout
    assert (state(whole)["skipped"], state(whole)["skipped_in_a_row"]) == (3, 0)

    command = tampered(tiny_data, parts, *SPIKING)
    stopped = helpers.run([*helpers.mpirun(3), *command], env=env | {"STOP_AT": "140"})
    assert stopped.returncode == 75, stopped.stdout
    assert 140 <= helpers.exit_record(parts)["step"] < 165
    done = helpers.run(command, env=env)
    assert done.returncode == 0, done.stdout
    assert spikes(parts) == spikes(whole)
    assert helpers.losses(parts) == helpers.losses(whole)
    assert state(parts)["losses"] == state(whole)["losses"]


def test_spikes_without_end_end_the_run_and_one_at_the_end_does_not(tiny_data: Path, tmp_path: Path) -> None:
    command = tampered(tiny_data, tmp_path / "many", *SPIKING)
    done = helpers.run(command, env={"SPIKES": "150 1000"})
    assert done.returncode == 1, done.stdout
    assert "step 159: 10 steps in a row updated nothing, this one for a loss of" in done.stdout
    command = tampered(tiny_data, tmp_path / "last", *SPIKING)
    done = helpers.run(command, env={"SPIKES": "190 190"})
    assert done.returncode == 0, done.stdout
    assert "done: 190 steps, 1 of them updated nothing" in done.stdout


def test_before_there_are_enough_losses_there_is_no_limit(tiny_data: Path, tmp_path: Path) -> None:
    command = tampered(tiny_data, tmp_path / "run", *SPIKING, "--train.steps", "60")
    done = helpers.run(command, env={"SPIKES": "50 50"})
    assert done.returncode == 0, done.stdout
    assert spikes(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("every", "found_at"),
    [(("--train.digest_every", "9", "--checkpoint.every", "5"), 9), (("--checkpoint.every", "5"), 10)],
    ids=["compared", "before a checkpoint"],
)
def test_a_flipped_bit_of_a_parameter_names_its_rank_and_is_not_saved(
    every: tuple[str, ...], found_at: int, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = helpers.run([*helpers.mpirun(3), *tampered(tiny_data, run, *every, *QUIET)], env={"FLIP": "1 7"})
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "error:" in line]
    who = f"rank 1 on {HOST} differ from all others"
    assert f"step {found_at}: silent corruption: the parameters of {who}" in line
    assert [folder.name for folder in restore.folders(run / "checkpoints")] == ["step-00000005"]
    assert helpers.exit_record(run)["state"] == "failed"
    done = helpers.run([*helpers.mpirun(2), *helpers.train_command(tiny_data, run, *QUIET)])
    assert done.returncode == 0, done.stdout
    assert "resumed from" in done.stdout


def test_a_flipped_bit_passes_where_nothing_is_compared(tiny_data: Path, tmp_path: Path) -> None:
    command = tampered(tiny_data, tmp_path / "run", "--train.digest_every", "0", *QUIET)
    done = helpers.run([*helpers.mpirun(2), *command], env={"FLIP": "1 7"})
    assert done.returncode == 0, done.stdout


def test_a_slow_rank_is_named_once(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = tampered(tiny_data, run, "--train.steps", "36", "--eval.batches", "0", "--log.every", "6")
    done = helpers.run([*helpers.mpirun(3), *command], env={"SLOW_RANK": "2"})
    assert done.returncode == 0, done.stdout
    (warning,) = [line for line in done.stdout.splitlines() if "takes" in line]
    assert f"rank 2 on {HOST} takes" in warning
    shown = [row for row in helpers.rows(run, "metrics.jsonl") if "slowest_rank" in row]
    assert [row["step"] for row in shown] == [6, 12, 18, 24, 30, 36]
    assert {row["slowest_rank"] for row in shown} == {2}
    assert all(row["slowdown"] > 1.3 for row in shown)
    alone = helpers.run(helpers.train_command(tiny_data, tmp_path / "alone"))
    assert alone.returncode == 0, alone.stdout
    assert not [row for row in helpers.rows(tmp_path / "alone", "metrics.jsonl") if "slowest_rank" in row]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the memory controller below that of this process."""
    own = node_memory._folders(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    group = next((g for g in own if (g / "cgroup.procs").exists()), Path("/")) / uuid.uuid4().hex
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no right to make a cgroup")
    if not any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
        group.rmdir()
        pytest.skip("no memory controller to hand on")
    yield group
    helpers.wait_until(lambda: not (group / "cgroup.procs").read_text(), within_s=20, what="an empty group")
    group.rmdir()


def test_a_node_that_runs_out_of_memory_is_told_and_saved(
    tiny_data: Path, tmp_path: Path, cgroup: Path
) -> None:
    run = tmp_path / "run"
    limit = next(p for n in ("memory.max", "memory.limit_in_bytes") if (p := cgroup / n).exists())
    limit.write_text(str(2**34))
    endless = (
        "--train.steps",
        "100000",
        "--eval.batches",
        "0",
        "--checkpoint.every",
        "0",
        "--log.every",
        "5",
    )
    join = ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs && exec "$@"', "sh"]
    command = [*join, *helpers.mpirun(2), *helpers.train_command(tiny_data, run, *endless)]
    with helpers.started(command, {}) as process:
        helpers.wait_for_step(run, 30)
        assert not restore.folders(run / "checkpoints")
        left = next(filter(None, (node_memory._read(cgroup, names) for names in node_memory._FILES)))
        limit.write_text(str(int((left.limit_bytes - left.available_bytes) / 0.97)))
        helpers.wait_until(
            lambda: bool(restore.folders(run / "checkpoints")), within_s=60, what="a checkpoint"
        )
        saved = len(helpers.losses(run))
        helpers.wait_for_step(run, saved + 30)
        limit.write_text(str(2**34))
        (run / "STOP").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    (warning,) = [line for line in output.splitlines() if "of memory" in line]
    assert f"warning: node {HOST} has 0.0" in warning
    # One for the warning, one for the stop.
    assert len(restore.folders(run / "checkpoints")) == 2
