"""A rehearsal in a real job: signal, save, exit, a second start; measured against this Slurm's own grace."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers
from tests.cluster import jobs

pytestmark = pytest.mark.usefixtures("slurm")


def arguments(data: Path, folder: Path, *more: str) -> list[str]:
    return ["--", "--data.path", str(data), "--train.out", str(folder / "run"), *more]


def rehearse(data: Path, folder: Path, *options: str, job: tuple[str, ...] = (), more: str = "") -> str:
    """Hand in a job of two nodes that rehearses; its number."""
    command = ["python", "-m", "hvdlm.slurm", "rehearse", *options, *arguments(data, folder, *more.split())]
    shape = ("--nodes=2", "--ntasks-per-node=1", f"--output={folder}/log")
    return jobs.submit(*shape, *job, f"--wrap={shlex.join(command)}")


def ended(number: str, folder: Path) -> tuple[int, str]:
    jobs.wait_for_end(number, within_s=240)
    (code,) = jobs.exit_codes(number)
    return int(code), (folder / "log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("mpi", ["none", "mpirun"])
def test_what_is_needed_is_measured_against_what_is_given(mpi: str, tiny_data: Path, tmp_path: Path) -> None:
    """In partition low a preempted job has 20 s of grace and then KillWait, 30 s."""
    number = rehearse(tiny_data, tmp_path, "--json", "--mpi", mpi, job=("--partition=low",))
    code, output = ended(number, tmp_path)
    assert code == 0, output
    report = json.loads(output)
    given = {bound["name"]: bound["given_s"] for bound in report["bounds"]}
    assert given == {"time limit": 120, "preemption": 50, "scancel": 30}
    assert report["fits"] is True
    assert 0 < report["stop_s"] < 30
    assert report["save"]["measured"] is False
    assert report["save"]["gib"] > 0
    assert not [*(tmp_path / "run").glob("rehearsal-*")]


@pytest.mark.long
def test_a_save_that_does_not_fit_says_what_to_change(tiny_data: Path, tmp_path: Path) -> None:
    """The run itself has measured an hour for a checkpoint; outside of a job a short one is handed in."""
    save = {"kind": "save", "step": 1, "snapshot_s": 0, "stall_s": 0, "write_s": 3600, "commit_s": 0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(save) + "\n")
    site = tmp_path / "site.env"
    site.write_text("HVDLM_MPI=none\nHVDLM_SBATCH=--partition=low\n")
    command = [sys.executable, "-m", "hvdlm.slurm", "rehearse", "--site", str(site)]
    done = helpers.run([*command, *arguments(tiny_data, tmp_path)], cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "does not fit: --train.stop_margin_s" in done.stdout
    assert "ask for GraceTime=" in done.stdout
    assert done.stdout.splitlines()[-1] == "does not fit"


def test_a_launcher_that_does_not_start_ranks_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    number = rehearse(tiny_data, tmp_path, "--mpi", "none", more="--train.device cuda")
    code, output = ended(number, tmp_path)
    assert code == 1, output
    assert "hvdlm slurm: error: rehearse: the launcher ended with " in output
    assert "before a first step" in output
    assert "Traceback" not in output


def test_outside_a_job_it_needs_a_site(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_JOB")}
    command = [sys.executable, "-m", "hvdlm.slurm", "rehearse"]
    env["PYTHONPATH"] = str(jobs.ROOT)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "hvdlm slurm: error: rehearse: found no Slurm job; start it in one, or give --site to hand one in\n"
    )
