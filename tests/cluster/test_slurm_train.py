"""Training under srun and in batch jobs, on a real Slurm of several nodes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers
from tests.cluster.jobs import batch, job_of, srun

pytestmark = pytest.mark.usefixtures("slurm")

ENDLESS = ("--train.steps", "100000", "--checkpoint.every", "10", "--eval.every", "0", "--log.every", "1000")
LONG = pytest.mark.long


def test_two_tasks_on_two_nodes_train_as_one_run(tiny_data: Path, tmp_path: Path) -> None:
    done = helpers.run([*srun(2, "--mpi=pmix"), *helpers.train_command(tiny_data, tmp_path / "run")])
    assert done.returncode == 0, done.stdout
    assert "2 rank(s) (mpi)" in done.stdout
    record = helpers.exit_record(tmp_path / "run")
    assert (record["state"], record["step"]) == ("done", 20)


def test_usr2_to_the_step_saves_and_one_task_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """Debian's MPI_Init aborts under srun without PMIx: one task must never touch it."""
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS)
    with helpers.started([*srun(2, "--mpi=pmix"), *command], {}) as process:
        helpers.wait_for_step(run_folder, 2)
        subprocess.run(["scancel", "--signal=USR2", f"{job_of(process)}.0"], check=True)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    record = helpers.exit_record(run_folder)
    assert (record["state"], record["exit_code"]) == ("stopped", 75)
    assert record["reason"] == "signal SIGUSR2"

    steps = record["step"] + 2
    done = helpers.run([*srun(1), *command, "--train.steps", str(steps)])
    assert done.returncode == 0, done.stdout
    assert "1 rank(s) (single)" in done.stdout
    assert helpers.samples(run_folder) == [(s, 8 * (s - 1), 8 * s) for s in range(1, steps + 1)]


def test_a_batch_job_stops_by_itself_before_its_end(tiny_data: Path, tmp_path: Path) -> None:
    """No signal is asked for: rank 0 asks Slurm for the job's end and tells the others."""
    log, run_folder = tmp_path / "log", tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS, "--train.stop_margin_s", "115")
    script = " ".join([*helpers.mpirun(2, "--map-by", "node"), *command])
    assert batch(script, log, "--nodes=2", "--time=2") == {"75"}, log.read_text()
    assert "2 rank(s) (mpi)" in log.read_text()
    record = helpers.exit_record(run_folder)
    assert (record["state"], record["reason"]) == ("stopped", "the job's time is nearly over")


def test_every_element_of_an_array_knows_its_own_end(tmp_path: Path) -> None:
    """The last has the array's number, under which squeue lists its brothers: one runs until it has asked."""
    code = "import os; from hvdlm.cluster.job import job_end; print(job_end(os.environ))"
    end = 'sed -n "s/^JobId=$SLURM_JOB_ID .* EndTime=\\([^ ]*\\).*/\\1/p"'
    show = f"scontrol --oneliner show job $SLURM_JOB_ID | {end} | date -f - +%s"
    # The first makes the last start later than its brother.
    wait = f"sleep 2; [ $SLURM_ARRAY_TASK_ID != 1 ] || until [ -s {tmp_path}/2 ]; do sleep 0.2; done"
    script = f"{sys.executable} -c '{code}'; {show}; {wait}"
    assert batch(script, tmp_path / "%a", "--time=5", "--array=0-2%2") == {"0"}
    outputs = [(tmp_path / str(element)).read_text().splitlines() for element in range(3)]
    assert [found for found, _ in outputs] == [f"JobEnd(unix={e}.0, trouble='')" for _, e in outputs]
    assert outputs[1] != outputs[2]
    unlimited = helpers.run([*srun(1), sys.executable, "-c", code])
    assert unlimited.stdout == "JobEnd(unix=0.0, trouble='')\n"


@pytest.mark.parametrize(("pmi", "within_s"), [("none", 15.0), pytest.param("pmix", 45.0, marks=LONG)])
def test_kill_9_of_one_task_ends_the_step(pmi: str, within_s: float, tiny_data: Path, tmp_path: Path) -> None:
    """By the option. Gloo sees that a peer is gone; MPI's ranks wait for it until KillWait is over."""
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *ENDLESS)
    with helpers.started([*srun(2, f"--mpi={pmi}", "--kill-on-bad-exit=1"), *command], {}) as process:
        helpers.wait_for_step(run_folder, 2)
        helpers.send(helpers.ranks_of(process)[1], signal.SIGKILL)
        helpers.wait_until(lambda: not helpers.family(process), within_s=within_s, what="all processes gone")
        assert process.wait() != 0
    assert helpers.exit_record(run_folder)["state"] in ("running", "failed")


def test_tasks_without_a_pmi_find_each_other(tiny_data: Path, tmp_path: Path) -> None:
    """By Gloo and a file in the run folder; MPI is not touched."""
    run_folder = tmp_path / "run"
    command = [*srun(3, "--mpi=none"), *helpers.train_command(tiny_data, run_folder)]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    assert "3 rank(s) (gloo)" in done.stdout
    assert helpers.exit_record(run_folder)["state"] == "done"
    assert not [*run_folder.glob(".rendezvous-*")]
    assert helpers.samples(run_folder) == [(s, 8 * (s - 1), 8 * s) for s in range(1, 21)]


def test_other_commands_without_a_pmi_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    """Each task would work alone."""
    done = helpers.run([*srun(2, "--mpi=none"), sys.executable, "-m", "hvdlm.evaluate", str(tmp_path)])
    assert done.returncode == 2, done.stdout
    assert "launch: srun started 2 tasks without PMIx" in done.stdout
    assert "Traceback" not in done.stdout
