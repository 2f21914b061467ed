"""Runs that save after every step, killed at any moment: what was committed is what the next start takes."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hvdlm.run import restore
from tests import helpers

ALWAYS_SAVING = (
    *("--train.steps", "1000000", "--checkpoint.every", "1", "--eval.batches", "0", "--log.every", "1000"),
    *("--model.width", "64", "--model.layers", "4"),
)


def kill_all(process: subprocess.Popen[str]) -> None:
    for member in helpers.family(process):
        with contextlib.suppress(psutil.Error):
            member.kill()


def kill_a_rank(process: subprocess.Popen[str]) -> None:
    ranks = helpers.ranks_of(process)
    with contextlib.suppress(psutil.Error):
        (random.choice(list(ranks.values())) if ranks else process).kill()


def kill_the_launcher(process: subprocess.Popen[str]) -> None:
    process.kill()


KILLS = (kill_all, kill_a_rank, kill_the_launcher)


def committed(run: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    return max((int(f.name.partition("-")[2]) for f in restore.folders(run / "checkpoints")), default=0)


def starts(run: Path) -> list[int]:
    """After which step each attempt began."""
    return [row["resumed_at"] - 1 for row in helpers.rows(run, "ledger.jsonl") if "resumed_at" in row]


def run_and_kill(
    command: list[str], run: Path, kill: Callable[[subprocess.Popen[str]], None], *, after_s: float
) -> int:
    """Start, kill some time after the first checkpoint of this start, and wait until all are gone.

    Returns:
        The newest checkpoint that was committed when the kill came.
    """
    before = committed(run)
    with helpers.started(command, {}) as process:
        helpers.wait_until(lambda: committed(run) > before, within_s=90, what="a checkpoint")
        time.sleep(after_s)
        newest = committed(run)
        kill(process)
        helpers.wait_until(lambda: not helpers.family(process), within_s=30, what="all processes gone")
    return newest


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_each_start_goes_on_from_the_newest_committed(ranks: int, tiny_data: Path, tmp_path: Path) -> None:
    run, choose = tmp_path / "run", random.Random(ranks)
    train = helpers.train_command(tiny_data, run, *ALWAYS_SAVING)
    newest = [
        run_and_kill([*helpers.mpirun(ranks), *train], run, kill, after_s=choose.uniform(0, 1))
        for kill in KILLS
    ]
    last = committed(run) + 2
    done = helpers.run([*train, "--train.steps", str(last)])
    assert done.returncode == 0, done.stdout
    assert all(began >= step for began, step in zip(starts(run)[1:], newest, strict=True))
    assert restore.newest_valid(run / "checkpoints") == (run / f"checkpoints/step-{last:08d}", [])
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert not list((run / "checkpoints").glob("*.corrupt*"))
    assert helpers.samples(run) == [(s, 8 * (s - 1), 8 * s) for s in range(1, last + 1)]


def test_a_write_that_is_cut_short_is_no_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    """The kill comes while files of an unfinished checkpoint are there; one at least must be met so."""
    run, met = tmp_path / "run", 0
    train = helpers.train_command(tiny_data, run, *ALWAYS_SAVING)
    for _ in range(5):
        newest = run_and_kill(train, run, kill_when_writing, after_s=0.1)
        met += bool(list((run / "checkpoints").glob("step-*.tmp-*/rank-*")))
        assert restore.newest_valid(run / "checkpoints")[0] is not None
        assert committed(run) >= newest
        if met:
            break
    assert met
    assert helpers.run([*train, "--train.steps", str(committed(run) + 1)]).returncode == 0
    assert not list((run / "checkpoints").glob("*.tmp-*"))


def kill_when_writing(process: subprocess.Popen[str]) -> None:
    out = Path(process.args[process.args.index("--train.out") + 1])  # type: ignore[index,union-attr,operator]
    give_up = time.monotonic() + 20
    while not list(out.glob("checkpoints/step-*.tmp-*/rank-*")) and time.monotonic() < give_up:
        pass
    helpers.send(process, signal.SIGKILL)
