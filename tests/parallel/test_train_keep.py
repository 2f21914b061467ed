"""Which checkpoints stay, and one on request, through the real command."""

from __future__ import annotations

import json
from pathlib import Path

from hvdlm.run import restore
from tests import helpers
from tests.parallel.test_train_bad_input import fails

# Large steps, so that the last validation need not be the best.
BUMPY = (
    *("--optim.lr", "0.5", "--optim.schedule", "constant", "--train.steps", "25"),
    *("--checkpoint.every", "5", "--eval.every", "5"),
)
ENDLESS = ("--train.steps", "100000", "--checkpoint.every", "0", "--eval.every", "0", "--log.every", "1000")


def kept(run: Path) -> set[int]:
    return {int(folder.name.partition("-")[2]) for folder in restore.folders(run / "checkpoints")}


def best(run: Path) -> list[int]:
    """Validated steps that were saved, the best first."""
    rows = [row for row in helpers.rows(run, "metrics.jsonl", kind="eval") if row["step"]]
    return [row["step"] for row in sorted(rows, key=lambda row: row["val_loss"])]


def test_what_is_kept_survives_a_resume(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = helpers.train_command(tiny_data, run, *BUMPY)
    done = helpers.run([*command, "--checkpoint.keep_best", "1"])
    assert done.returncode == 0, done.stdout
    assert kept(run) == {20, 25, best(run)[0]}
    assert [row["step"] for row in helpers.rows(run, "metrics.jsonl", kind="save")] == [5, 10, 15, 20, 25]
    state = json.loads((run / "checkpoints/step-00000025/state.json").read_text())
    assert [one["step"] for one in state["best"]] == best(run)[:1]
    (run / "checkpoints/step-00000020/KEEP").touch()
    more = ("--checkpoint.keep_best", "1", "--checkpoint.keep_every", "40", "--train.steps", "50")
    more = (*more, "--checkpoint.asynchronous", "false")
    done = helpers.run([*helpers.mpirun(2), *command, *more])
    assert done.returncode == 0, done.stdout
    assert kept(run) == {20, 40, 45, 50, best(run)[0]}
    saves = helpers.rows(run, "metrics.jsonl", kind="save", attempt=2)
    assert [row["step"] for row in saves] == [30, 35, 40, 45, 50]
    assert all(row["bytes"] > 0 and row["stall_s"] > 0 for row in saves)


def test_a_file_saves_and_the_run_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = helpers.train_command(tiny_data, run, *ENDLESS)
    with helpers.started([*helpers.mpirun(2), *command], {}) as process:
        helpers.wait_for_step(run, 10)
        assert not kept(run)
        for saved in (1, 2):
            (run / "SAVE").touch()
            helpers.wait_until(lambda: not (run / "SAVE").exists(), within_s=30, what="SAVE removed")
            assert len(kept(run)) == saved
            helpers.wait_for_step(run, max(kept(run)) + 50)
        # Once for each file.
        assert len(kept(run)) == 2
        (run / "STOP").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.count(f"(file {run / 'SAVE'})") == 2
    steps = helpers.exit_record(run)["step"]
    assert helpers.samples(run) == [(s, 8 * (s - 1), 8 * s) for s in range(1, steps + 1)]


def test_checkpoints_by_the_clock_are_begun_by_all_ranks_together(tiny_data: Path, tmp_path: Path) -> None:
    """A failure each 72 ms: the first is due after two seconds, the others as soon as one is written."""
    run = tmp_path / "run"
    command = helpers.train_command(tiny_data, run, *ENDLESS, "--checkpoint.mtbf_h", "2e-5")
    with helpers.started([*helpers.mpirun(2), *command], {}) as process:
        helpers.wait_until(
            lambda: len(helpers.rows(run, "metrics.jsonl", kind="save")) >= 4,
            within_s=60,
            what="four checkpoints",
        )
        (run / "STOP").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    steps = helpers.exit_record(run)["step"]
    assert max(kept(run)) == steps
    assert helpers.samples(run) == [(s, 8 * (s - 1), 8 * s) for s in range(1, steps + 1)]


def test_a_disk_too_small_for_the_checkpoints_is_known_before_the_first_step(
    tiny_data: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with helpers.small_disk(disk, size_kib=800):
        command = [*helpers.mpirun(2), *helpers.train_command(tiny_data, disk / "run")]
        fails(command, 1, "GiB free, needed", "for 3 checkpoint(s)", "lower checkpoint.keep_last")
        assert not helpers.rows(disk / "run", "metrics.jsonl")
        assert helpers.exit_record(disk / "run")["state"] == "failed"
        done = helpers.run([*command, "--checkpoint.every", "0"])
        assert done.returncode == 0, done.stdout
