"""One rank's exception ends the whole job, with that rank's traceback."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from hvdlm.comm.world import World
from hvdlm.config import EXIT_CRASH, EXIT_INTERRUPTED, UserError
from hvdlm.run import exit_record, jobs

_PEER_RECORD_WAIT_S = 5.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def end_job(
    command: str, error: BaseException, world: World, *, run_folder: Path | None = None, attempt: int = 0
) -> None:
    """Report an exception of this rank and end every process of the run; never returns.

    A user error is one line, anything else a traceback. A collective that failed because another
    rank died is the echo of that rank's error: its own report gets a few seconds to be the first.

    Args:
        command: its name, for the message.
        error: what this rank cannot go on from.
        world: the ranks to end.
        run_folder: where the failure is recorded; None before there is one.
        attempt: number of this start of the run.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        place = error.filename or run_folder
        error = UserError(f"{place}: {error.strerror}; make room there, then start again", EXIT_CRASH)
    exit_code = error.exit_code if isinstance(error, UserError) else EXIT_CRASH
    summary = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
    where = f"hvdlm {command}: rank {world.rank}"
    if _is_echo(error):
        _wait_for_peer(run_folder, attempt)
        print(f"{where}: lost contact with another rank: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        exit_code = EXIT_INTERRUPTED
        print(f"{where}: interrupted", file=sys.stderr, flush=True)
    elif isinstance(error, UserError):
        print(f"{where}: error: {error}", file=sys.stderr, flush=True)
    else:
        print(f"{where} failed:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
    try:
        if run_folder is not None:
            record(run_folder, attempt=attempt, rank=world.rank, exit_code=exit_code, error=summary)
    finally:
        world.abort(exit_code)


def leave_together(command: str, error: UserError, world: World, *, run_folder: Path, attempt: int) -> None:
    """Report an error that every rank has, on rank 0; all leave in order.

    Args:
        command: its name, for the message.
        error: the same on all ranks.
        world: that leave.
        run_folder: where the failure is recorded.
        attempt: number of this start of the run; 0 = it has none yet: a refusal, noted for the Slurm job.
    """
    if world.is_root:
        print(f"hvdlm {command}: error: {error}", file=sys.stderr, flush=True)
        if attempt:
            record(run_folder, attempt=attempt, rank=0, exit_code=error.exit_code, error=str(error))
        else:
            jobs.note_refusal(run_folder, os.environ, exit_code=error.exit_code, error=str(error))


def record(run_folder: Path, *, attempt: int, rank: int, exit_code: int, error: str) -> None:
    """Write the failure down; where that fails too, on a full disk say, tell so."""
    try:
        exit_record.write_failure(run_folder, attempt=attempt, rank=rank, exit_code=exit_code, error=error)
    except (OSError, UserError) as second:
        print(f"hvdlm: rank {rank}: failure not recorded: {second}", file=sys.stderr, flush=True)


def end_job_on_thread_errors(world: World, run_folder: Path, attempt: int) -> None:
    """Make an exception that no thread caught end the job: Python alone would train on."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            end_job("train", args.exc_value, world, run_folder=run_folder, attempt=attempt)

    threading.excepthook = hook


def _is_echo(error: BaseException) -> bool:
    return type(error).__name__ == "HorovodInternalError"


def _wait_for_peer(run_folder: Path | None, attempt: int) -> None:
    give_up = time.monotonic() + _PEER_RECORD_WAIT_S
    while run_folder is not None and time.monotonic() < give_up:
        if exit_record.failures(run_folder, attempt):
            return
        time.sleep(0.2)
