"""Starts without progress, and the plateau, through the real command."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests import helpers

NEVER_SAVED = ("--train.steps", "100000", "--checkpoint.every", "0", "--eval.every", "0")


def kill_at_step_5(command: list[str], run: Path) -> None:
    rows = len(helpers.rows(run, "metrics.jsonl", kind="train"))
    with helpers.started(command, {}) as process:
        helpers.wait_until(
            lambda: len(helpers.rows(run, "metrics.jsonl", kind="train")) > rows + 5,
            within_s=60,
            what="some steps",
        )
        helpers.send(process, signal.SIGKILL)
        process.wait()


def test_the_fourth_start_without_progress_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = helpers.train_command(tiny_data, run, *NEVER_SAVED)
    for _ in range(3):
        kill_at_step_5(command, run)
    for _ in range(2):
        done = helpers.run(command)
        assert done.returncode == 93, done.stdout
        assert "attempt 3 ended without a word" in done.stdout
        assert helpers.exit_record(run)["state"] == "no_progress"
    (run / "exit.json").unlink()
    done = helpers.run([*command, "--train.steps", "5"])
    assert done.returncode == 0, done.stdout


def test_a_plateau_ends_a_stopped_run_where_an_undisturbed_one_ends(tiny_data: Path, tmp_path: Path) -> None:
    more = ("--optim.schedule", "plateau", "--optim.plateau_patience", "2", "--optim.min_lr", "3e-4")
    more = (*more, "--optim.plateau_threshold", "0.5", "--eval.every", "3", "--train.steps", "200")
    more = (*more, "--parallel.strategy", "fixed")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = helpers.run(helpers.train_command(tiny_data, whole, *more))
    assert done.returncode == 0, done.stdout
    record = helpers.exit_record(whole)
    assert (record["state"], record["reason"]) == ("done", "plateau")
    parted.mkdir()
    (parted / "STOP").touch()
    command = helpers.train_command(tiny_data, parted, *more)
    assert helpers.run(command).returncode == 75
    (parted / "STOP").touch()
    assert helpers.run([*helpers.mpirun(2), *command]).returncode == 75
    done = helpers.run([*helpers.mpirun(2), *command])
    assert done.returncode == 0, done.stdout
    assert helpers.losses(parted) == helpers.losses(whole)
    last = f"checkpoints/step-{record['step']:08d}/state.json"
    states = [json.loads((run / last).read_text()) for run in (whole, parted)]
    assert states[0]["plateau"] == states[1]["plateau"]
    assert states[0]["losses"] == states[1]["losses"]
    done = helpers.run(command)
    assert done.returncode == 0
    assert "the validation loss stood still" in done.stdout
