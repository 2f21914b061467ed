"""Runs by the shipped batch script that are ended early, and go on by themselves to where they would have been."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests import helpers
from tests.cluster import batch_site, faults, jobs
from tests.cluster.batch_site import log, rows, sbatch, submit, write_site
from tests.cluster.one_machine import Machine

pytestmark = [pytest.mark.usefixtures("slurm"), pytest.mark.long]

EVERY = 20
STEPS = 500
FIXED = ("--parallel.strategy", "fixed")
ALLREDUCE = ("--parallel.strategy", "allreduce")


def train(data: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    return helpers.train_command(
        data,
        out,
        *("--train.steps", str(steps), "--train.global_batch", "32", "--checkpoint.every", str(EVERY)),
        *("--eval.every", "0", "--log.every", "1000", *more),
    )


def restarts(job: str) -> int:
    (found,) = re.findall(r" Restarts=(\d+) ", jobs.ask("scontrol", "--oneliner", "show", "job", job))
    return int(found)


TOLD = {
    "scancel": lambda job: subprocess.run(["scancel", job], check=True),
    "USR2": lambda job: faults.tell(job, "USR2"),
    "TERM": lambda job: faults.tell(job, "TERM"),
    "preempted": lambda _: faults.preempt(),
}


@pytest.mark.parametrize(("how", "code"), [("scancel", "0"), ("USR2", "75"), ("TERM", "75"), ("preempted", "75")])
def test_the_successor_of_a_job_that_was_told_to_end(
    how: str, code: str, tiny_data: Path, tmp_path: Path
) -> None:
    """It goes on with the step after the last: within the grace, or KillWait, the ranks have saved."""
    site, run_folder = write_site(tmp_path, "pmix" if how == "USR2" else "none"), tmp_path / "run"
    command = train(tiny_data, run_folder, *FIXED)
    first, second = (sbatch(site, command, "--partition=low", "--no-requeue") for _ in range(2))
    faults.wait_for_step(run_folder, EVERY + 5)
    TOLD[how](first)
    jobs.wait_for_end(first)
    record = helpers.exit_record(run_folder)
    jobs.wait_for_end(second)
    assert jobs.exit_codes(second) == {"0"}, log(site, first) + log(site, second)
    assert (faults.state_of(first), jobs.exit_codes(first)) == ("CANCELLED" if code == "0" else "FAILED", {code})
    assert [start.redone for start in faults.starts(run_folder)] == [0]
    assert record["state"] in ("stopped", "running")
    faults.assert_undisturbed(run_folder, command, STEPS)
