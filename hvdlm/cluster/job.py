"""What Slurm says of the job that this process runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from hvdlm.cluster.bounded import run_bounded

_ASK_LIMIT_S = 10.0


@final
@dataclass(frozen=True)
class JobEnd:
    """When the job is over.

    Attributes:
        unix: seconds since 1970; 0 where there is no job, no limit or no answer.
        trouble: why there is no answer; empty where there is one.
    """

    unix: float = 0.0
    trouble: str = ""


def job_end(env: Mapping[str, str]) -> JobEnd:
    """The end of this job's time limit; from the environment, else the controller is asked.

    Slurm 22.05 tells a step nothing of it, newer releases set SLURM_JOB_END_TIME. One rank of a
    job should ask, and hand the answer to the others: the controller serves everybody.

    Args:
        env: this process's environment.
    """
    told = env.get("SLURM_JOB_END_TIME", "")
    if told.isdigit():
        return JobEnd(float(told))
    job = env.get("SLURM_JOB_ID", "")
    return _ask(job) if job else JobEnd()


def _ask(job: str) -> JobEnd:
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%A %e"]
    outcome = run_bounded(command, limit_s=_ASK_LIMIT_S, more_env={"SLURM_TIME_FORMAT": "%s"})
    if outcome.code != 0:
        return JobEnd(trouble=f"squeue: {outcome.reason}")
    # The number of an array's job lists all its elements; %A is an element's own.
    ends = dict(line.split(maxsplit=1) for line in outcome.output.splitlines() if " " in line)
    end = ends.get(job, "no such job")
    if end == "NONE":
        return JobEnd()
    return JobEnd(float(end)) if end.isdigit() else JobEnd(trouble=f"squeue: job {job}: {end}")
