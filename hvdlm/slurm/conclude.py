"""Say how a job's training ended, as its exit code; run by the batch script after the ranks.

srun and mpirun give codes of their own where they ended ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from hvdlm.cluster.queue import own_job, queued
from hvdlm.config import EXIT_CRASH, EXIT_DONE, total_steps
from hvdlm.config.parse import folder_of, load_config
from hvdlm.run import exit_record, jobs
from hvdlm.run.lease import holding_job
from hvdlm.run.retry import what_forbids

AGAIN = "again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher-code", type=int, required=True, metavar="N", help="what srun or mpirun ended with"
    )
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: those of train")


def run(args: argparse.Namespace) -> int:
    """Print `again` where another start would go on from there.

    Returns:
        0 done, 75 stopped early, 93 no progress, 2 refused; anything else is a crash.
    """
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder, number = folder_of(config, recipe), os.environ.get("SLURM_JOB_ID", "")
    mine = [row for row in jobs.rows(folder) if row["job"] == number]
    begun: dict[str, Any] = next((row for row in reversed(mine) if row["event"] == jobs.BEGUN), {})
    refusal = mine[-1] if mine and mine[-1]["event"] == jobs.REFUSED else None
    record = exit_record.read(folder)
    began = record.get("time_unix", 0.0) != begun.get("exit_record_unix", 0.0)
    code, why = _outcome(record if began else None, refusal, args.launcher_code)
    held_by = _job_at_work(folder, own=number) if refusal and code == EXIT_CRASH else ""
    if held_by:
        why = f"job {held_by} is at it; this one is not queued again"
    print(f"hvdlm slurm: {folder}: {why}: exit code {code}", file=sys.stderr, flush=True)
    if number:
        jobs.note(folder, number, jobs.ENDED, exit_code=code, began=began, held_by=held_by)
        submitted_unix = own_job(os.environ).submitted_unix or time.time()
        forbids = what_forbids(folder, steps=total_steps(config), submitted_unix=submitted_unix)
        if code != EXIT_DONE and not forbids and not held_by:
            print(AGAIN, flush=True)
    return code


def _job_at_work(folder: Path, *, own: str) -> str:
    """Another job that trains this run, by its lease and by Slurm: then somebody handed the run in twice.

    A holder that Slurm does not have any more leaves the folder soon: that is waited for by trying again.
    """
    holder = holding_job(folder)
    others = queued(numbers=(holder,)) if holder and holder != own else []
    return next((job.number for job in others or [] if job.number == holder and job.state == "RUNNING"), "")


def _outcome(
    record: dict[str, Any] | None, refusal: dict[str, Any] | None, launcher_code: int
) -> tuple[int, str]:
    """The exit code of the job, and how training ended.

    Args:
        record: exit.json, if it was written in this job.
        refusal: train would not begin.
        launcher_code: of srun or mpirun.
    """
    if refusal:
        return int(refusal["exit_code"]), "train would not begin"
    if record is None:
        return launcher_code, "no start began" if launcher_code else "nothing to do"
    if record["state"] == "running":
        return launcher_code or EXIT_CRASH, "the ranks ended without a word"
    code = int(record.get("exit_code", EXIT_CRASH))
    return code, f"{record['state']} after step {record.get('step', 0)}"
