"""Say whether a job should train at all; run by the batch script before the ranks start."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from hvdlm.cluster.queue import OwnJob, own_job
from hvdlm.config import EXIT_CRASH, UserError, total_steps
from hvdlm.config.parse import folder_of, load_config
from hvdlm.run import exit_record, jobs, stop
from hvdlm.run.lease import FILE_NAME as LEASE_FILE
from hvdlm.run.retry import what_forbids

GO = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: those of train")


def run(args: argparse.Namespace) -> int:
    """Print `train`, or the exit code of a job that should not; why, on stderr.

    Returns:
        0 where either was printed.

    Raises:
        UserError: the configuration is refused, as train would.
    """
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder = folder_of(config, recipe)
    job = own_job(os.environ)
    # Without an answer better once too often than never.
    submitted_unix = job.submitted_unix or time.time()
    forbids = what_forbids(folder, steps=total_steps(config), submitted_unix=submitted_unix)
    if forbids:
        _say(f"{folder}: {forbids.kind}: {forbids.why}; this job does not train")
        print(forbids.exit_code, flush=True)
        return 0
    _take_old_wish(folder / stop.STOP_FILE, folder / LEASE_FILE)
    if job.number:
        _note(folder, job)
    print(GO, flush=True)
    return 0


def _say(line: str) -> None:
    print(f"hvdlm slurm: {line}", file=sys.stderr, flush=True)


def _take_old_wish(wish: Path, lease: Path) -> None:
    """A STOP from before this job was handed in is answered by handing it in; train would still hear it."""
    if wish.exists() and not lease.exists():
        wish.unlink(missing_ok=True)
        _say(f"{wish} is older than this job, and removed")


def _note(folder: Path, job: OwnJob) -> None:
    before = exit_record.read(folder).get("time_unix", 0.0)
    try:
        jobs.note(
            folder, job.number, jobs.BEGUN, log=job.log, ends_unix=job.ends_unix, exit_record_unix=before
        )
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; choose another train.out", EXIT_CRASH
        ) from error
