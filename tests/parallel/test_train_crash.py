"""Whatever dies, nothing hangs, nothing is orphaned, and the last checkpoint resumes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import helpers

WITHIN_S = 15.0
ENDLESS = ("--train.steps", "100000", "--checkpoint.every", "10", "--eval.every", "0", "--log.every", "1000")
HOROVODRUN = ["horovodrun", "-np", "2"]
HOROVODRUN_GLOO = ["horovodrun", "--gloo", "-np", "2"]
LAUNCHERS = [helpers.mpirun(2), HOROVODRUN, HOROVODRUN_GLOO]


def name_of(words: list[str]) -> str:
    return "-".join(w.strip("-") for w in words[:2] if w != "-np")


def wait_for_checkpoint(run_folder: Path) -> None:
    """Of some step: they are written beside the steps, on a busy disk many of them."""
    helpers.wait_for_step(run_folder, 15)
    helpers.wait_until(
        lambda: any((run_folder / "checkpoints").glob("step-????????")), within_s=60, what="a checkpoint"
    )


def assert_all_gone(process: subprocess.Popen[str]) -> None:
    helpers.wait_until(lambda: not helpers.family(process), within_s=WITHIN_S, what="all processes gone")


def assert_resumes(tiny_data: Path, run_folder: Path) -> None:
    newest = sorted((run_folder / "checkpoints").glob("step-????????"))[-1]
    steps = int(newest.name.partition("-")[2]) + 2
    done = helpers.run(helpers.train_command(tiny_data, run_folder, *ENDLESS, "--train.steps", str(steps)))
    assert done.returncode == 0, done.stdout
    assert str(newest) in done.stdout
    assert helpers.samples(run_folder) == [(s, 8 * (s - 1), 8 * s) for s in range(1, steps + 1)]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
def test_kill_9_of_a_rank_ends_the_job(launcher: list[str], tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    with helpers.started([*launcher, *helpers.train_command(tiny_data, run_folder, *ENDLESS)], {}) as process:
        wait_for_checkpoint(run_folder)
        helpers.send(helpers.ranks_of(process)[1], signal.SIGKILL)
        assert_all_gone(process)
        assert process.wait() != 0
    assert helpers.exit_record(run_folder)["state"] in ("running", "failed")
    assert_resumes(tiny_data, run_folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
def test_the_death_of_the_launcher_leaves_no_orphan(
    launcher: list[str], number: signal.Signals, tiny_data: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    with helpers.started([*launcher, *helpers.train_command(tiny_data, run_folder, *ENDLESS)], {}) as process:
        wait_for_checkpoint(run_folder)
        helpers.send(process, number)
        assert_all_gone(process)
        if launcher != HOROVODRUN_GLOO or number != signal.SIGTERM:
            assert process.wait() != 0
        # Else horovodrun waits for a process twice (safe_shell_exec.py, by psutil and by subprocess), and
        # has 0 for its code where psutil was faster.
    assert helpers.exit_record(run_folder)["state"] != "done"
    assert_resumes(tiny_data, run_folder)


def test_one_rank_alone_is_no_orphan_either(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS)
    with helpers.started([*helpers.mpirun(1), *command], {}) as process:
        wait_for_checkpoint(run_folder)
        helpers.send(process, signal.SIGKILL)
        assert_all_gone(process)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=name_of)
def test_an_exception_of_one_rank_ends_all_with_its_traceback(
    launcher: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    failing = Path(__file__).parent / "failing_train.py"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS)
    command[1:3] = [str(failing), "step"]
    with helpers.started([*launcher, *command], {}) as process:
        helpers.wait_for_step(run_folder, 3)
        assert_all_gone(process)
        output = process.stdout.read() if process.stdout else ""
        assert process.wait() != 0
    assert "ZeroDivisionError" in output
    assert "rank 1 failed" in output
    record = helpers.exit_record(run_folder)
    assert (record["state"], record["rank"]) == ("failed", 1)
    assert "ZeroDivisionError" in record["error"]


def test_an_exception_of_a_thread_ends_the_job(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    failing = Path(__file__).parent / "failing_train.py"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS)
    command[1:3] = [str(failing), "thread"]
    done = helpers.run([*helpers.mpirun(2), *command])
    assert done.returncode == 1, done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert helpers.exit_record(run_folder)["rank"] == 1


def test_a_second_interrupt_ends_at_once(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    slow = ("--train.global_batch", "4096", "--train.micro_batch", "1")
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS, *slow)
    with helpers.started(command, {}) as process:
        helpers.wait_for_step(run_folder, 1)
        helpers.send(process, signal.SIGINT)
        # Two signals in one instant would be merged into one.
        time.sleep(0.2)
        helpers.send(process, signal.SIGINT)
        assert process.wait(timeout=WITHIN_S) == 130
