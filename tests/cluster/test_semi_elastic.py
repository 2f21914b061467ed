"""Runs by the shipped batch script that end early, and go on by themselves to where they would have been."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests import helpers
from tests.cluster import batch_site, faults, jobs
from tests.cluster.batch_site import log, rows, sbatch, submit, write_site
from tests.cluster.one_machine import Machine

pytestmark = pytest.mark.usefixtures("slurm")
LONG = pytest.mark.long

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
        pytest.param("scancel", "SIGTERM", "none", marks=LONG),
        pytest.param("USR2", "SIGUSR2", "pmix", marks=LONG),
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


@LONG
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


@LONG
def test_the_time_limit_s_signal(tiny_data: Path, tmp_path: Path) -> None:
    """The first job has a successor, the second queues itself again; Slurm tells up to a minute early."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    # Its steps cannot be known before, so that the rate must not depend on them.
    more = ("--optim.schedule", "constant", "--train.stop_margin_s", "5", *FIXED)
    command = train(tiny_data, run_folder, *more, steps=100000)
    first, second = (sbatch(site, command, "--time=2", "--signal=USR2@30") for _ in range(2))
    faults.wait_for_start(run_folder, 1)
    assert (faults.state_of(first), jobs.exit_codes(first)) == ("FAILED", {"75"}), log(site, first)
    faults.wait_for_start(run_folder, 2)
    assert [restarts(job) for job in (first, second)] == [0, 1]
    (run_folder / "STOP").touch()
    jobs.wait_for_end(second)
    for job in (first, second):
        assert "(signal SIGUSR2); the same command goes on" in log(site, job)
    assert [row["job"] for row in rows(run_folder, "begun")] == [first, second, second]
    assert [start.redone for start in faults.starts(run_folder)] == [0, 0]
    faults.assert_undisturbed(run_folder, command, helpers.exit_record(run_folder)["step"])


@LONG
def test_a_chain_of_five_to_the_end(tiny_data: Path, tmp_path: Path) -> None:
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    command = train(tiny_data, run_folder, *ALLREDUCE)
    chain = submit(site, command, "--chain", "5")
    for attempt, job in enumerate(chain[:-1], 1):
        faults.wait_for_start(run_folder, attempt - 1)
        faults.wait_for_step(run_folder, 40 * attempt)
        faults.tell(job, "USR2")
    jobs.wait_for_end(chain[-1])
    assert [jobs.exit_codes(job) for job in chain] == [{"75"}] * 4 + [{"0"}], log(site, chain[0])
    assert [row["job"] for row in rows(run_folder, "begun")] == chain
    assert [start.redone for start in faults.starts(run_folder)] == [0] * 4
    faults.assert_undisturbed(run_folder, command, STEPS)


@LONG
def test_one_node_then_three_then_two(tiny_data: Path, tmp_path: Path) -> None:
    """A run is on as many nodes as its job gets, and its losses do not tell, to the last bit."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    command, nodes = train(tiny_data, run_folder, *FIXED), (1, 3, 2)
    chain = [sbatch(site, command, f"--nodes={count}") for count in nodes]
    for attempt, job in enumerate(chain[:-1], 1):
        faults.wait_for_start(run_folder, attempt - 1)
        faults.wait_for_step(run_folder, 70 * attempt)
        faults.tell(job, "USR2")
    jobs.wait_for_end(chain[-1])
    assert [jobs.exit_codes(job) for job in chain] == [{"75"}, {"75"}, {"0"}], log(site, chain[0])
    sizes = {
        row["attempt"]: row["world_size"] for row in helpers.rows(run_folder, "ledger.jsonl") if "step" in row
    }
    assert sizes == {1: 1, 2: 3, 3: 2}
    faults.assert_undisturbed(run_folder, command, STEPS)


@LONG
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_node_that_dies_in_the_middle_of_a_step(
    which: str, machine: Machine, tiny_data: Path, tmp_path: Path
) -> None:
    """Off the network, so that nobody hears of it: Slurm notices, and queues the job again."""
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    # A quarter of a second; next to none of it is the save.
    long_steps = ("--train.global_batch", "512", "--checkpoint.every", "4")
    command = train(tiny_data, run_folder, *FIXED, *long_steps, steps=30)
    job = sbatch(site, command)
    faults.wait_for_step(run_folder, 10)
    machine.kill(faults.nodes_of(job)[0 if which == "first" else -1], unplug=True)
    faults.wait_for_start(run_folder, 1)
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"0"}, log(site, job)
    assert restarts(job) == 1
    (start,) = faults.starts(run_folder)
    assert 0 < start.redone < 8
    faults.assert_undisturbed(run_folder, command, 30)


@LONG
def test_a_node_that_dies_in_the_middle_of_a_save(machine: Machine, tiny_data: Path, tmp_path: Path) -> None:
    """What it had written is no checkpoint, and is cleared away; the one before is gone on from."""
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    large = ("--model.width", "512", "--model.layers", "4", "--model.heads", "8", "--checkpoint.every", "4")
    command = train(tiny_data, run_folder, *FIXED, *large, steps=30)
    job = sbatch(site, command)
    faults.wait_for_step(run_folder, 6)
    before = faults.saved_step(run_folder)
    pieces = "step-*.tmp-*/rank-*"
    helpers.wait_until(lambda: any((run_folder / "checkpoints").glob(pieces)), within_s=60, what="a save")
    machine.kill(faults.nodes_of(job)[0])
    half = [*(run_folder / "checkpoints").glob(pieces)]
    assert half and faults.saved_step(run_folder) - before < 8
    newest = faults.saved_step(run_folder)
    faults.wait_for_start(run_folder, 1)
    assert faults.resumed_at(run_folder) == newest + 1
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"0"}, log(site, job)
    assert restarts(job) == 1
    assert not [*(run_folder / "checkpoints").glob("*.tmp-*")]
    faults.assert_undisturbed(run_folder, command, 30)


@LONG
def test_two_submissions_of_one_run(tiny_data: Path, tmp_path: Path) -> None:
    """Under two names, so that Slurm starts both. The second is told whose the run is and ends for good; the
    first, which dies of something else afterwards, has its successor."""
    site, run_folder = paced_site(tmp_path, "none"), tmp_path / "run"
    command = train(tiny_data, run_folder, *FIXED, "--optim.schedule", "constant", steps=5000)
    first, successor = (sbatch(site, command, "--no-requeue") for _ in range(2))
    faults.wait_for_start(run_folder, 0)
    seconds = [sbatch(site, command, f"--job-name=again-{number}") for number in range(3)]
    for job in seconds:
        jobs.wait_for_end(job)
        assert f"is being trained by another start (job {first}, process " in log(site, job), log(site, job)
        assert (jobs.exit_codes(job), restarts(job)) == ({"1"}, 0), log(site, job)
    assert faults.state_of(first) == "RUNNING"
    faults.kill_rank(first, Random(0))
    faults.wait_for_start(run_folder, 1)
    assert faults.state_of(successor) == "RUNNING", log(site, successor)
    (run_folder / "STOP").touch()
    jobs.wait_for_end(successor)
    faults.assert_undisturbed(run_folder, command, helpers.exit_record(run_folder)["step"])


@LONG
@pytest.mark.parametrize("mpi", ["none", "pmix", "mpirun"])
def test_a_rank_that_raises(mpi: str, tiny_data: Path, tmp_path: Path) -> None:
    """Its job ends within 15 s, and says whose fault it was; the successor goes on."""
    fails = tmp_path / "has-failed"
    site, run_folder = paced_site(tmp_path, mpi, HVDLM_TEST_FAILS=fails), tmp_path / "run"
    command = train(tiny_data, run_folder, *ALLREDUCE)
    first, second = (sbatch(site, command, "--no-requeue") for _ in range(2))
    helpers.wait_until(fails.exists, within_s=90, what="the failure")
    node = faults.nodes_of(first)[1]
    helpers.wait_until(lambda: not batch_site.ranks(first), within_s=15, what="no rank left")
    record = helpers.exit_record(run_folder)
    assert (record["state"], record["rank"], record["host"]) == ("failed", 1, node)
    assert record["error"] == "ZeroDivisionError: integer division or modulo by zero"
    jobs.wait_for_end(first)
    assert (faults.state_of(first), jobs.exit_codes(first)) == ("FAILED", {"1"}), log(site, first)
    assert faults.state_of(second) in ("PENDING", "RUNNING")
    jobs.wait_for_end(second)
    assert (faults.state_of(second), jobs.exit_codes(second)) == ("COMPLETED", {"0"}), log(site, second)
    assert "rank 1 failed:" in log(site, first)
    (start,) = faults.starts(run_folder)
    assert start.redone < 2 * EVERY
    faults.assert_undisturbed(run_folder, command, STEPS)
