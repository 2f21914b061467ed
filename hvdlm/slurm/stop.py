"""End a run's jobs: those that wait at once, the one that runs with a checkpoint (--save) or without."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hvdlm.cluster.queue import QueuedJob, cancel
from hvdlm.config import EXIT_CRASH, EXIT_DONE, UserError
from hvdlm.run import exit_record
from hvdlm.run.stop import STOP_FILE
from hvdlm.slurm.status import jobs_of

_POLL_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--save",
        action="store_true",
        help="let the run save first, by the file STOP; else scancel, which leaves it Slurm's KillWait",
    )
    parser.add_argument(
        "--wait-s", type=float, default=900.0, metavar="S", help="how long to wait for the end (%(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns: 0 once no job of the run is left.

    Raises:
        UserError: there is no such run, Slurm refuses, or the job is still there after the wait.
    """
    found = jobs_of(args.run)
    waiting, running = [job for job in found if job.waits], [job for job in found if not job.waits]
    # The wish first: no successor may begin between the two.
    if args.save and running:
        (args.run / STOP_FILE).touch()
    _cancel(waiting if args.save else [*waiting, *running])
    print(f"{len(waiting)} waiting job(s) cancelled, {len(running)} running told to stop", flush=True)
    _wait(args.run, args.wait_s)
    end = exit_record.read(args.run)
    said = end.get("reason") or end.get("error") or "without a word"
    print(f"{args.run}: {end.get('state', 'never begun')} after step {end.get('step', 0)}: {said}")
    if not running:
        print("no job was running", file=sys.stderr)
    return EXIT_DONE


def _cancel(jobs: list[QueuedJob]) -> None:
    if trouble := cancel(jobs):
        raise UserError(f"{trouble}; try again", EXIT_CRASH)


def _wait(run_folder: Path, limit_s: float) -> None:
    give_up = time.monotonic() + limit_s
    while left := jobs_of(run_folder):
        if time.monotonic() > give_up:
            numbers = " ".join(job.number for job in left)
            raise UserError(
                f"job {numbers} is still there after {limit_s:g} s; scancel {numbers}", EXIT_CRASH
            )
        time.sleep(_POLL_S)
