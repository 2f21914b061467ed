"""Preprocessing under srun, as a job array and in batch jobs, on a real Slurm of several nodes."""

from __future__ import annotations

import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from hvdlm.corpus import existing
from tests import helpers
from tests.cluster import jobs
from tests.corpora import SOME, contents, preprocess_command, write_corpus

pytestmark = pytest.mark.usefixtures("slurm")

MODULE = "hvdlm.preprocess"
SCRIPT = jobs.ROOT / "slurm" / "preprocess.sh"
ONE_WORKER = ("--workers", "1")
WITHIN_S = 15.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough tasks that a job is still at work when it is told to stop."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=9000)


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("expected")
    done = helpers.run(preprocess_command(corpus, out, *ONE_WORKER))
    assert done.returncode == 0, done.stdout
    return contents(out)


def wait_for_tasks(out: Path, count: int) -> None:
    """Until so many tasks are encoded."""
    encoded = out / existing.WORK_NAME / "done" / "encode"
    helpers.wait_until(lambda: len([*encoded.glob("0*.json")]) >= count, within_s=60, what=f"{count} tasks")


@pytest.mark.parametrize("pmi", ["pmix", "none"])
def test_tasks_do_not_show(pmi: str, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """With a PMI by MPI; without one by Slurm's numbers, and MPI is not touched."""
    command = [*jobs.srun(3, f"--mpi={pmi}"), *preprocess_command(corpus, tmp_path / "out", *ONE_WORKER)]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("documents  ") == 1
    assert contents(tmp_path / "out") == expected


def test_a_job_array_makes_one_data_set(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Two elements at a time, the third when one of them is done; each is a step of two tasks."""
    out = tmp_path / "out"
    script = f"srun --mpi=none {shlex.join(preprocess_command(corpus, out, *ONE_WORKER))}"
    codes = jobs.batch(script, tmp_path / "%a.log", "--nodes=2", "--array=3-5%2")
    logs = [(tmp_path / f"{element}.log").read_text() for element in (3, 4, 5)]
    assert codes == {"0"}, logs
    assert contents(out) == expected


@pytest.mark.parametrize("pmi", ["pmix", "none"])
def test_another_job_on_the_same_folder_is_one_line(pmi: str, corpus: Path, tmp_path: Path) -> None:
    """None of its tasks may touch what the first one does, which stands still to be there for sure."""
    command = preprocess_command(corpus, tmp_path / "out", *ONE_WORKER)
    with helpers.started([*jobs.srun(2, "--mpi=none"), *command], {}) as first:
        wait_for_tasks(tmp_path / "out", 1)
        at_work = helpers.family(first)
        for process in at_work:
            helpers.send(process, signal.SIGSTOP)
        second = helpers.run([*jobs.srun(2, f"--mpi={pmi}", "--kill-on-bad-exit=1"), *command])
        for process in at_work:
            helpers.send(process, signal.SIGCONT)
        output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert second.returncode == 2, second.stdout
    lines = [line for line in second.stdout.splitlines() if line.startswith("hvdlm")]
    assert lines == [
        f"hvdlm preprocess: error: {tmp_path / 'out'}: another program writes there; wait for it, or "
        "choose another --out"
    ]


def test_kill_9_of_one_task_ends_the_step_and_the_next_goes_on(
    corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = preprocess_command(corpus, out, *ONE_WORKER)
    with helpers.started([*jobs.srun(3, "--mpi=pmix", "--kill-on-bad-exit=1"), *command], {}) as process:
        wait_for_tasks(out, 2)
        helpers.send(helpers.ranks_of(process, MODULE)[1], signal.SIGKILL)
        helpers.wait_until(lambda: not helpers.family(process), within_s=WITHIN_S, what="all processes gone")
        assert process.wait() != 0
    assert not (out / "manifest.json").exists()
    done = helpers.run([*jobs.srun(2, "--mpi=pmix"), *command])
    assert done.returncode == 0, done.stdout
    assert "of them were done before" in done.stdout
    assert contents(out) == expected


def test_usr2_to_a_batch_job_stops_it_with_75(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = preprocess_command(corpus, out, *ONE_WORKER)
    script = f"srun --kill-on-bad-exit=1 --mpi=none {shlex.join(command)}"
    job = jobs.submit(f"--output={log}", "--ntasks=3", "--nodes=2", f"--wrap={script}")
    wait_for_tasks(out, 2)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"75"}, log.read_text()
    assert "stopped; the same command goes on from there" in log.read_text()
    assert not (out / "manifest.json").exists()
    done = helpers.run([*jobs.srun(2, "--mpi=none"), *command])
    assert done.returncode == 0, done.stdout
    assert "of them were done before" in done.stdout
    assert contents(out) == expected


@pytest.mark.parametrize("options", [(), ("--array=0-1", "--nodes=1")])
def test_the_script_queues_itself_again_until_it_is_done(
    options: tuple[str, ...], corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """All elements of an array are told to stop; each queues itself again, and goes on."""
    out = tmp_path / "out"
    job = submit_script(tmp_path, *options, str(SCRIPT), str(corpus), "--out", str(out), *SOME)
    wait_for_tasks(out, 2)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    jobs.wait_for_end(job)
    logs = [path.read_text() for path in tmp_path.glob("hvdlm-preprocess-*.log")]
    assert jobs.exit_codes(job) == {"0"}, logs
    shown = jobs.ask("scontrol", "--oneliner", "show", "job", job)
    assert shown.count("Restarts=1 ") == len(logs) == max(1, len(options)), logs
    for log in logs:
        assert log.index("preprocess.sh: queueing this job again") < log.index("documents  ")
    assert any("of them were done before" in log for log in logs)
    assert contents(out) == expected


def test_the_script_ends_for_good_when_trying_again_cannot_help(corpus: Path, tmp_path: Path) -> None:
    job = submit_script(tmp_path, str(SCRIPT), str(corpus / "nothing"), "--out", str(tmp_path / "out"))
    jobs.wait_for_end(job)
    log = (tmp_path / f"hvdlm-preprocess-{job}.log").read_text()
    assert jobs.exit_codes(job) == {"2"}, log
    assert "Restarts=0 " in jobs.ask("scontrol", "--oneliner", "show", "job", job)
    assert [line for line in log.splitlines() if line.startswith("hvdlm preprocess: error: ")], log
    assert "Traceback" not in log


def submit_script(folder: Path, *arguments: str) -> str:
    """Hand in slurm/preprocess.sh from a folder, with one worker a node; the job's number."""
    return jobs.submit(f"--chdir={folder}", "--cpus-per-task=1", *arguments)
