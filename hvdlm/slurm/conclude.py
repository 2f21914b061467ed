"""Say how a job's training ended, as its exit code; run by the batch script after the ranks.

srun and mpirun give codes of their own where they ended ranks. A job that another start may go on from, and
that has no successor in the queue, is queued again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from hvdlm.cluster.queue import own_job, queued, requeue
from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_USAGE, total_steps
from hvdlm.config.parse import load_config, run_folder
from hvdlm.run import exit_record, jobs
from hvdlm.run.retry import what_forbids

_MOST_REQUEUES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher-code", type=int, required=True, metavar="N", help="what srun or mpirun ended with"
    )
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: those of train")


def run(args: argparse.Namespace) -> int:
    """Returns: 0 done, 75 stopped early, 93 no progress, 2 refused; anything else is a crash."""
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder, steps, number = (
        run_folder(config, recipe),
        total_steps(config),
        os.environ.get("SLURM_JOB_ID", ""),
    )
    mine = [row for row in jobs.rows(folder) if row["job"] == number]
    begun: dict[str, Any] = next((row for row in reversed(mine) if row["event"] == jobs.BEGUN), {})
    refusal = mine[-1] if mine and mine[-1]["event"] == jobs.REFUSED else None
    record = exit_record.read(folder)
    began = record.get("time_unix", 0.0) != begun.get("exit_record_unix", 0.0)
    code, why = _outcome(record if began else None, refusal, args.launcher_code)
    print(f"hvdlm slurm: {folder}: {why}: exit code {code}", file=sys.stderr, flush=True)
    if number:
        jobs.note(folder, number, jobs.ENDED, exit_code=code, began=began)
        if code not in (EXIT_DONE, EXIT_USAGE):
            _go_on(folder, steps)
    return code


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


def _go_on(folder: Path, steps: int) -> None:
    """Queue this job again, if the run may go on and nothing is queued that would do so."""
    job = own_job(os.environ)
    if what_forbids(folder, steps=steps, submitted_unix=job.submitted_unix or time.time()):
        return
    name = os.environ.get("SLURM_JOB_NAME", "")
    others = queued(name)
    if others is None or any(one.waits and one.number != job.number for one in others):
        return
    most = int(os.environ.get("HVDLM_REQUEUES", str(_MOST_REQUEUES)))
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= most:
        print(
            f"hvdlm slurm: not queued again after {most} requeues; hand it in again",
            file=sys.stderr,
            flush=True,
        )
        return
    print("hvdlm slurm: no successor is queued: queueing this job again", file=sys.stderr, flush=True)
    if trouble := requeue(job.number):
        print(f"hvdlm slurm: {trouble}; hand it in again, it goes on from there", file=sys.stderr, flush=True)
