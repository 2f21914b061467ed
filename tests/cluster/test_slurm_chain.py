"""The shipped train_64gpu.sh as a user hands it in, on two nodes of a real Slurm."""

from __future__ import annotations

import json
import signal
import site as sites
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import helpers
from tests.cluster import batch_site, jobs
from tests.cluster.batch_site import log, rows, sbatch, submit, write_site

pytestmark = pytest.mark.usefixtures("slurm")

ENDLESS = ("--train.steps", "100000", "--checkpoint.every", "10", "--eval.every", "0", "--log.every", "1000")
STEPS = 600


def train(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    return helpers.train_command(data, out, *ENDLESS, "--train.steps", str(steps), *more)


def packed_environment(folder: Path) -> Path:
    """A small one, that takes its packages from this one."""
    made, tar = folder / "environment", folder / "environment.tar"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    (own,) = made.glob("lib/python3*/site-packages")
    (own / "more.pth").write_text("\n".join(sites.getsitepackages()))
    subprocess.run(["tar", "-C", str(made), "-cf", str(tar), "."], check=True)
    return tar


def exact(steps: int) -> list[tuple[int, int, int]]:
    """Every sample once."""
    return [(s, 8 * (s - 1), 8 * s) for s in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("mpi", "kind", "how", "code"),
    [
        ("pmix", "mpi", "USR2", "75"),
        pytest.param("none", "gloo", "USR2", "75", marks=pytest.mark.long),
        pytest.param("mpirun", "mpi", "kill", "137", marks=pytest.mark.long),
    ],
)
def test_a_chain(mpi: str, kind: str, how: str, code: str, tiny_data: Path, tmp_path: Path) -> None:
    """With each launcher. The second job goes on after a signal to the first, or kill -9 of its rank. A wish
    to stop ends the second and the third, which nobody has cancelled; a job handed in later goes on."""
    site, run_folder = write_site(tmp_path, mpi), tmp_path / "run"
    first, second, third = submit(site, train(tiny_data, run_folder, 100000), "--chain", "3")
    helpers.wait_for_step(run_folder, 12)
    if how == "kill":
        helpers.send(batch_site.rank(first, 1), signal.SIGKILL)
    else:
        subprocess.run(["scancel", f"--signal={how}", first], check=True)
    jobs.wait_for_end(first)
    helpers.wait_until(lambda: "resumed from" in log(site, second), within_s=90, what="the second start")
    (run_folder / "STOP").touch()
    jobs.wait_for_end(second)
    jobs.wait_for_end(third)
    assert f"2 rank(s) ({kind})" in log(site, first)
    assert [jobs.exit_codes(job) for job in (first, second, third)] == [{code}, {"75"}, {"75"}], log(
        site, first
    )
    assert "stopped by a wish" in log(site, third)

    (run_folder / "STOP").touch()
    time.sleep(1.1)  # Slurm tells seconds.
    steps = helpers.exit_record(run_folder)["step"] + 3
    fourth, fifth = (sbatch(site, train(tiny_data, run_folder, steps)) for _ in range(2))
    jobs.wait_for_end(fourth)
    jobs.wait_for_end(fifth)
    assert [jobs.exit_codes(job) for job in (fourth, fifth)] == [{"0"}, {"0"}], log(site, fourth)
    assert f"done: finished after step {steps}; this job does not train" in log(site, fifth)
    assert helpers.samples(run_folder) == exact(steps)
    assert [row["job"] for row in rows(run_folder, "begun")] == [first, second, fourth]
    assert rows(run_folder, "begun")[0]["log"].endswith(f"-{first}.log")


@pytest.mark.long
def test_under_mpirun_a_preemption_s_term_leaves_time_to_save(tiny_data: Path, tmp_path: Path) -> None:
    """Open MPI's daemons get it as well, and would kill the ranks one second later; a step takes longer."""
    site, run_folder = write_site(tmp_path, "mpirun"), tmp_path / "run"
    command = train(tiny_data, run_folder, 100000, "--train.global_batch", "3000")
    job = sbatch(site, command, "--no-requeue")
    helpers.wait_for_step(run_folder, 1)
    time.sleep(0.5)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"75"}, log(site, job)
    assert helpers.exit_record(run_folder)["reason"] == "signal SIGTERM"


@pytest.mark.long
def test_a_lone_job_queues_itself_again(tiny_data: Path, tmp_path: Path) -> None:
    """Each time with the environment unpacked on its nodes, whose memory is their own."""
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    with site.open("a") as file:
        file.write(f"HVDLM_ENV_TAR={packed_environment(tmp_path)}\nHVDLM_TMPDIR=/dev/shm/of-job\n")
    job = sbatch(site, train(tiny_data, run_folder, STEPS))
    helpers.wait_for_step(run_folder, 2)
    assert batch_site.rank(job, 1).cmdline()[0] == f"/dev/shm/of-job/hvdlm-env-{job}/bin/python"
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"0"}, log(site, job)
    assert "Restarts=1 " in jobs.ask("scontrol", "--oneliner", "show", "job", job)
    assert log(site, job).count("queueing this job again") == 1
    assert helpers.samples(run_folder) == exact(STEPS)


def test_what_train_refuses_is_not_tried_again(tiny_data: Path, tmp_path: Path) -> None:
    """A second start on a folder that never began too: exit.json is not there to tell."""
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    command = train(tmp_path / "nothing", run_folder, STEPS)
    first, second = sbatch(site, command), sbatch(site, command)
    jobs.wait_for_end(second)
    assert [jobs.exit_codes(job) for job in (first, second)] == [{"2"}, {"2"}], log(site, first)
    assert "Restarts=0 " in jobs.ask("scontrol", "--oneliner", "show", "job", first)
    assert "refused: " in log(site, second) and "no manifest.json" in log(site, second)
    assert [row["job"] for row in rows(run_folder, "begun")] == [first]
    mistyped = sbatch(site, [*command, "--train.stepz", "3"])
    jobs.wait_for_end(mistyped)
    assert jobs.exit_codes(mistyped) == {"2"}
    assert "did you mean train.steps?" in log(site, mistyped)


def test_status_tail_and_stop(tiny_data: Path, tmp_path: Path) -> None:
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    first, second = submit(site, train(tiny_data, run_folder, 100000), "--chain", "2")
    helpers.wait_for_step(run_folder, 12)
    report = json.loads(batch_site.slurm(site, "status", str(run_folder), "--json").stdout)
    assert [(job["job"], job["state"]) for job in report["jobs"]] == [(first, "RUNNING"), (second, "PENDING")]
    assert report["step"] >= 12 and report["steps"] == 100000 and report["kept_share"] == 1.0
    assert 0 < report["job_left_s"] < 600 < report["chain_left_s"] < 1200
    assert report["save"]["best_every_steps"] >= 1
    assert "2 rank(s) (gloo)" in batch_site.slurm(site, "tail", str(run_folder)).stdout
    done = batch_site.slurm(site, "stop", str(run_folder), "--save")
    assert done.returncode == 0, done.stdout
    assert "1 waiting job(s) cancelled, 1 running told to stop" in done.stdout
    assert helpers.exit_record(run_folder)["state"] == "stopped"
    assert not jobs.ask("squeue", "--noheader")
    lines = batch_site.slurm(site, "status", str(run_folder)).stdout
    assert "no job is queued or running" in lines and "exit.json: stopped, attempt 1" in lines


def test_what_cannot_run_here_is_not_handed_in(tiny_data: Path, tmp_path: Path) -> None:
    site = write_site(tmp_path, "pmix_v9")
    arguments = ["--data.path", str(tiny_data), "--train.out", str(tmp_path / "run")]
    done = batch_site.slurm(site, "submit", *arguments)
    assert done.returncode == 2
    assert "error: launcher: HVDLM_MPI=pmix_v9, but srun knows " in done.stdout
    write_site(tmp_path, "none")
    done = batch_site.slurm(site, "submit", "--nodes", "9", *arguments)
    assert done.returncode == 2
    assert "error: sbatch: Slurm would refuse it: " in done.stdout
    assert not jobs.ask("squeue", "--noheader")
    assert not (tmp_path / "run").exists()
