"""Stopped at step 10 or so and resumed: the same run as one that was never stopped."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdlm.run import exit_record
from tests import helpers

# Steps long enough for a signal to land in the middle, and few enough for rounding to stay small.
STEPS = (
    *("--train.steps", "50", "--train.global_batch", "128"),
    *("--eval.every", "0", "--checkpoint.every", "0", "--log.every", "100"),
)


def stop_by_usr1_to_mpirun(process: subprocess.Popen[str], run_folder: Path) -> None:
    helpers.send(process, signal.SIGUSR1)


def stop_by_term_to_one_rank(process: subprocess.Popen[str], run_folder: Path) -> None:
    helpers.send(helpers.ranks_of(process)[1], signal.SIGTERM)


def stop_by_file(process: subprocess.Popen[str], run_folder: Path) -> None:
    (run_folder / "STOP").touch()


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = helpers.run([*helpers.mpirun(2), *helpers.train_command(tiny_data, run_folder, *STEPS)])
    assert done.returncode == 0, done.stdout
    return run_folder


@pytest.mark.parametrize(
    ("stop", "ranks_after"),
    [(stop_by_usr1_to_mpirun, 2), (stop_by_term_to_one_rank, 3), (stop_by_file, 1)],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    stop: Callable[[subprocess.Popen[str], Path], None],
    ranks_after: int,
    tiny_data: Path,
    tmp_path: Path,
    undisturbed: Path,
) -> None:
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *STEPS)
    with helpers.started([*helpers.mpirun(2), *command], {}) as process:
        helpers.wait_for_step(run_folder, 10)
        stop(process, run_folder)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    record = helpers.exit_record(run_folder)
    assert (record["state"], record["exit_code"]) == ("stopped", 75)
    assert 10 <= record["step"] < 50
    assert f"stopped after step {record['step']}" in output
    assert not (run_folder / "STOP").exists()

    launcher = helpers.mpirun(ranks_after) if ranks_after > 1 else []
    done = helpers.run([*launcher, *command])
    assert done.returncode == 0, done.stdout
    assert helpers.exit_record(run_folder)["state"] == "done"
    assert helpers.samples(run_folder) == helpers.samples(undisturbed)
    found, expected = helpers.losses(run_folder), helpers.losses(undisturbed)
    assert found == (expected if ranks_after == 2 else pytest.approx(expected, rel=1e-4))


def test_the_same_command_after_the_end_says_so(tiny_data: Path, undisturbed: Path) -> None:
    done = helpers.run(helpers.train_command(tiny_data, undisturbed, *STEPS))
    assert done.returncode == 0
    assert "finished, all 50 steps are done" in done.stdout


def test_a_finished_run_says_so_whatever_its_last_start_left(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, "--train.steps", "1")
    run_folder.mkdir()
    (run_folder / "STOP").touch()
    assert helpers.run(command).returncode == 0
    assert not (run_folder / "STOP").exists()
    # As if it had died between its last checkpoint and its last word.
    exit_record.write(run_folder, "running", attempt=1, step=0)
    assert helpers.run(command).returncode == 0
    assert helpers.exit_record(run_folder)["state"] == "done"


def test_a_wish_to_stop_counts_for_the_step_it_comes_in(tiny_data: Path, tmp_path: Path) -> None:
    """A step of many seconds: 2048 micro-batches."""
    run_folder = tmp_path / "run"
    slow = ("--train.global_batch", "2048", "--train.micro_batch", "1", "--checkpoint.every", "0")
    command = helpers.train_command(tiny_data, run_folder, *slow)
    with helpers.started(command, {}) as process:
        helpers.wait_for_step(run_folder, 1)
        helpers.send(process, signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert helpers.exit_record(run_folder)["step"] == 2


def test_stop_by_interrupt_of_one_process(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    with helpers.started(helpers.train_command(tiny_data, run_folder, *STEPS), {}) as process:
        helpers.wait_for_step(run_folder, 10)
        helpers.send(process, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output


def test_stop_before_the_end_of_the_slurm_job(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    past = {"SLURM_JOB_END_TIME": "1000000000"}
    done = helpers.run(helpers.train_command(tiny_data, run_folder, *STEPS), env=past)
    assert done.returncode == 75, done.stdout
    assert helpers.exit_record(run_folder)["reason"] == "the job's time is nearly over"


def test_a_second_start_on_the_folder_leaves_the_first_alone(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    endless = ("--train.steps", "100000", "--eval.every", "0", "--log.every", "1000")
    command = helpers.train_command(tiny_data, run_folder, *endless)
    with helpers.started(command, {}) as process:
        helpers.wait_for_step(run_folder, 15)
        second = helpers.run([*helpers.mpirun(2), *command])
        assert "is being trained by another start" in second.stdout
        assert helpers.exit_record(run_folder) | {"state": "running", "attempt": 1} == helpers.exit_record(
            run_folder
        )
        (run_folder / "STOP").touch()
        assert process.wait(timeout=60) == 75
    assert not (run_folder / "alive.json").exists()
