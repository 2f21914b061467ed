"""The shipped batch script on the tests' Slurm, changed by nothing but a site file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests import helpers
from tests.cluster import jobs

SCRIPT = jobs.ROOT / "slurm" / "train_64gpu.sh"
_IN_RANKS = Path(__file__).parent / "in_ranks"
_SITE = """\
HVDLM_SBATCH="--nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=0 --signal=USR2@60 --time=10"
HVDLM_MPI={mpi}
HVDLM_PREFLIGHT=0
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
OMP_NUM_THREADS=1
"""


def write_site(folder: Path, mpi: str) -> Path:
    """A site of two nodes without GPUs."""
    path = folder / "test.env"
    path.write_text(_SITE.format(mpi=mpi))
    return path


def pace(site: Path, step_s: float, **more: object) -> None:
    """Steps take at least so long; what else `in_ranks/sitecustomize.py` is to do."""
    ours = {"PYTHONPATH": f"{_IN_RANKS}:{jobs.ROOT}", "HVDLM_TEST_STEP_S": step_s, **more}
    with site.open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in ours.items())


def environment(site: Path) -> dict[str, str]:
    """That of a user who activated the environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "HVDLM_SITE": str(site), "PYTHONPATH": str(jobs.ROOT)}


def slurm(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m hvdlm.slurm` from the folder of the site; logs go there.

    Not by `helpers.run`, which would kill the jobs that have begun by then: they have its token.
    """
    command = [sys.executable, "-m", "hvdlm.slurm", *arguments]
    output, errors = subprocess.PIPE, subprocess.STDOUT
    env = {**os.environ, **environment(site)}
    return subprocess.run(
        command, cwd=site.parent, env=env, stdout=output, stderr=errors, text=True, timeout=120
    )


def submit(site: Path, train: list[str], *options: str) -> list[str]:
    """Hand in a chain by the command; the jobs' numbers."""
    done = slurm(site, "submit", *options, *train[train.index("hvdlm.train") + 1 :])
    assert done.returncode == 0, done.stdout
    return [line.removeprefix("job ") for line in done.stdout.splitlines() if line.startswith("job ")]


def sbatch(site: Path, train: list[str], *options: str) -> str:
    """Hand in one job of train_64gpu.sh by sbatch alone; its number."""
    return hand_in(SCRIPT, site, train[train.index("hvdlm.train") + 1 :], *options)


def hand_in(script: Path, site: Path, arguments: list[str], *options: str) -> str:
    """Hand in a job of a script by sbatch alone; its number."""
    read = f'set -a; . {site}; exec sbatch --parsable $HVDLM_SBATCH "$@"'
    arguments = [*options, str(script), *arguments]
    env = {**os.environ, **environment(site)}
    command = ["bash", "-c", read, "bash", *arguments]
    done = subprocess.run(command, cwd=site.parent, env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def log(site: Path, job: str) -> str:
    """What a job printed."""
    return "".join(path.read_text() for path in site.parent.glob(f"*-{job}.log"))


def ranks(job: str) -> dict[int, psutil.Process]:
    """The training processes of a job."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            own = env.get("OMPI_COMM_WORLD_RANK", env.get("SLURM_PROCID"))
            if env.get("SLURM_JOB_ID") == job and own and "hvdlm.train" in process.cmdline():
                found[int(own)] = process
    return found


def rank(job: str, number: int) -> psutil.Process:
    """A training process of a job."""
    return ranks(job)[number]


def rows(run_folder: Path, event: str) -> list[dict[str, Any]]:
    """Rows of jobs.jsonl."""
    return helpers.rows(run_folder, "jobs.jsonl", event=event)
