"""Asking Slurm for steps and batch jobs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests import helpers

ROOT = Path(__file__).parents[2]


def srun(tasks: int, *more: str) -> list[str]:
    """A step that is spread over two nodes where it has several tasks."""
    return ["srun", f"--ntasks={tasks}", f"--nodes={min(tasks, 2)}", *more]


def batch(script: str, log: Path, *more: str) -> set[str]:
    """Run a batch job of two tasks, or an array of them, to the end; the exit codes."""
    job = submit(f"--output={log}", "--ntasks=2", *more, f"--wrap={script}")
    wait_for_end(job)
    return exit_codes(job)


def submit(*arguments: str) -> str:
    """Hand in a batch job; its number."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()


def wait_for_end(job: str, *, within_s: float = 90) -> None:
    """Not by `sbatch --wait`, which looks ever more seldom and learns of the end half a minute late."""
    helpers.wait_until(
        lambda: not ask("squeue", "--noheader", f"--jobs={job}"), within_s=within_s, what=f"job {job}"
    )


def exit_codes(job: str) -> set[str]:
    """Of a job that is over, or of all elements of an array."""
    return set(re.findall(r" ExitCode=(\d+):", ask("scontrol", "--oneliner", "show", "job", job)))


def ask(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def job_of(process: subprocess.Popen[str], module: str = "hvdlm.train") -> str:
    """The job in which an srun has made its step."""
    return helpers.ranks_of(process, module)[0].environ()["SLURM_JOB_ID"]
