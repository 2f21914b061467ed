"""Runs by the shipped batch script that end early, and go on by themselves to where they would have been."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests import helpers
from tests.cluster import batch_site, faults, jobs
from tests.cluster.batch_site import log, rows, sbatch, submit, write_site
from tests.cluster.one_machine import Machine

pytestmark = [pytest.mark.usefixtures("slurm"), pytest.mark.long]

EVERY = 10
STEPS = 250
STEP_S = 0.02
FIXED = ("--parallel.strategy", "fixed")
ALLREDUCE = ("--parallel.strategy", "allreduce")


def train(data: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    often = ("--checkpoint.every", str(EVERY), "--eval.every", "0", "--log.every", "1000")
    return helpers.train_command(data, out, *often, "--train.steps", str(steps), *more)


def paced_site(folder: Path, mpi: str, **more: object) -> Path:
    """Steps are long enough for what comes in between, and cost the machine little."""
    site = write_site(folder, mpi)
    batch_site.pace(site, STEP_S, **more)
    return site


def restarts(job: str) -> int:
    (found,) = re.findall(r" Restarts=(\d+) ", jobs.ask("scontrol", "--oneliner", "show", "job", job))
    return int(found)


TOLD = {
    "scancel": lambda job: subprocess.run(["scancel", job], check=True),
    "USR2": lambda job: faults.tell(job, "USR2"),
    "TERM": lambda job: faults.tell(job, "TERM"),
    "preemption": lambda _: faults.preempt(),
}


@pytest.mark.parametrize(
    ("how", "heard", "mpi"),
    [
        ("scancel", "SIGTERM", "none"),
        ("USR2", "SIGUSR2", "pmix"),
        ("TERM", "SIGTERM", "mpirun"),
        ("preemption", "SIGTERM", "none"),
    ],
)
def test_a_successor_loses_no_step_of_a_job_that_was_told_to_end(
    how: str, heard: str, mpi: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Within the grace, or KillWait, the ranks have saved."""
    site, run_folder = paced_site(tmp_path, mpi), tmp_path / "run"
    command = train(tiny_data, run_folder, *(FIXED if mpi == "none" else ALLREDUCE))
    first, second = (sbatch(site, command, "--partition=low", "--no-requeue") for _ in range(2))
    faults.wait_for_step(run_folder, EVERY + 5)
    TOLD[how](first)
    jobs.wait_for_end(first)
    jobs.wait_for_end(second)
    assert jobs.exit_codes(second) == {"0"}, log(site, first) + log(site, second)
    assert f"(signal {heard}); the same command goes on" in log(site, first)
    state = ("CANCELLED", {"0"}) if how == "scancel" else ("FAILED", {"75"})
    assert (faults.state_of(first), jobs.exit_codes(first)) == state
    assert [start.redone for start in faults.starts(run_folder)] == [0]
    faults.assert_undisturbed(run_folder, command, STEPS)


def test_an_administrator_s_requeue_loses_no_step(tiny_data: Path, tmp_path: Path) -> None:
    """The same job starts again, before its successor."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    command = train(tiny_data, run_folder, *FIXED)
    first, second = (sbatch(site, command) for _ in range(2))
    faults.wait_for_step(run_folder, EVERY + 5)
    faults.requeue(first)
    faults.wait_for_start(run_folder, 1)
    jobs.wait_for_end(second)
    assert [jobs.exit_codes(job) for job in (first, second)] == [{"0"}, {"0"}], log(site, first)
    assert [restarts(job) for job in (first, second)] == [1, 0]
    assert [row["job"] for row in rows(run_folder, "begun")] == [first, first]
    assert [start.redone for start in faults.starts(run_folder)] == [0]
    faults.assert_undisturbed(run_folder, command, STEPS)


def test_the_time_limit_s_signal(tiny_data: Path, tmp_path: Path) -> None:
    """The first job has a successor, the second queues itself again; Slurm tells up to a minute early."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    # Its steps cannot be known before, so that the rate must not depend on them.
    more = ("--optim.schedule", "constant", "--train.stop_margin_s", "5", *FIXED)
    command = train(tiny_data, run_folder, *more, steps=100000)
    first, second = (sbatch(site, command, "--time=2", "--signal=USR2@30") for _ in range(2))
    faults.wait_for_start(run_folder, 1, within_s=200)
    assert (faults.state_of(first), jobs.exit_codes(first)) == ("FAILED", {"75"}), log(site, first)
    faults.wait_for_start(run_folder, 2, within_s=200)
    assert [restarts(job) for job in (first, second)] == [0, 1]
    (run_folder / "STOP").touch()
    jobs.wait_for_end(second)
    for job in (first, second):
        assert "(signal SIGUSR2); the same command goes on" in log(site, job)
    assert [row["job"] for row in rows(run_folder, "begun")] == [first, second, second]
    assert [start.redone for start in faults.starts(run_folder)] == [0, 0]
    faults.assert_undisturbed(run_folder, command, helpers.exit_record(run_folder)["step"])


def test_a_chain_of_five_to_the_end(tiny_data: Path, tmp_path: Path) -> None:
    """On 1, 2, 3, 2 and 1 nodes, with one curve to the last bit."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    command = train(tiny_data, run_folder, *FIXED)
    nodes = (1, 2, 3, 2, 1)
    chain = submit(site, command, "--chain", "5")
    for job, count in zip(chain[1:], nodes[1:], strict=True):
        update = ["scontrol", "update", f"JobId={job}", f"NumNodes={count}", f"NumTasks={count}"]
        subprocess.run(update, check=True)
    for attempt, job in enumerate(chain[:-1], 1):
        faults.wait_for_start(run_folder, attempt - 1)
        faults.wait_for_step(run_folder, 60 * attempt)
        faults.tell(job, "USR2")
    jobs.wait_for_end(chain[-1])
    assert [jobs.exit_codes(job) for job in chain] == [{"75"}] * 4 + [{"0"}], log(site, chain[0])
    worlds = {row["attempt"]: row["world_size"] for row in helpers.rows(run_folder, "ledger.jsonl", step=1)}
    assert worlds
    faults.assert_undisturbed(run_folder, command, STEPS)
