"""Print the end of the log of a run's newest job."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hvdlm.config import EXIT_DONE, UserError
from hvdlm.run import jobs
from hvdlm.slurm.status import jobs_of

_POLL_S = 0.5
_LOOK_S = 5.0
_END_BYTES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("-n", type=int, default=20, metavar="N", dest="lines", help="lines (%(default)d)")
    parser.add_argument(
        "-f", action="store_true", dest="follow", help="go on with what comes, through all jobs of the chain"
    )


def run(args: argparse.Namespace) -> int:
    """Returns: 0.

    Raises:
        UserError: no job of the run has begun.
    """
    log = newest_log(args.run)
    if log is None:
        raise UserError(f"{args.run}: no job of this run has begun; python -m hvdlm.slurm status {args.run}")
    print(f"==> {log}", file=sys.stderr, flush=True)
    place = _print_end(log, args.lines)
    if args.follow:
        _follow(args.run, log, place)
    return EXIT_DONE


def newest_log(run_folder: Path) -> Path | None:
    """Where the output of the job that began last goes."""
    logs = [row["log"] for row in jobs.rows(run_folder) if row["event"] == jobs.BEGUN and row.get("log")]
    return Path(logs[-1]) if logs else None


def _print_end(log: Path, lines: int) -> int:
    """Print the last lines; the place behind them."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _END_BYTES))
            found = file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise UserError(f"{log}: is not there any more") from error
    sys.stdout.write("".join(found[-lines:]))
    sys.stdout.flush()
    return size


def _follow(run_folder: Path, log: Path, place: int) -> None:
    """Until no job of the run is queued or running."""
    looked = time.monotonic()
    while True:
        more = _print_from(log, place)
        place += more
        if not more and time.monotonic() - looked > _LOOK_S:
            looked, newest = time.monotonic(), newest_log(run_folder) or log
            if newest != log:
                log, place = newest, 0
                print(f"==> {log}", file=sys.stderr, flush=True)
            elif not jobs_of(run_folder):
                return
        time.sleep(_POLL_S)


def _print_from(log: Path, place: int) -> int:
    with log.open("rb") as file:
        file.seek(place)
        new = file.read()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return len(new)
