"""``python -m hvdlm.preprocess``: text to tokenizer to HDF5 shards. The work is in `hvdlm.corpus`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from hvdlm.cluster.job import job_end
from hvdlm.config import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEUE, UserError, run_command
from hvdlm.corpus import crew as crews
from hvdlm.corpus.build import build
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.options import Options
from hvdlm.corpus.work import PeerError, StoppedError
from hvdlm.preprocess.arguments import parse
from hvdlm.preprocess.report import summary
from hvdlm.run.stop import deadline

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_STOP_MARGIN_S = 60.0
_LEAVE_S = 10.0


def main(argv: list[str] | None = None) -> int:
    """Shard a corpus.

    Args:
        argv: arguments, without the program's name; None = those of the process.

    Returns:
        The exit code.

    Raises:
        UserError: bad usage or input, or a full disk.
    """
    options, workers, force = parse(argv)
    return _run(options, workers, force=force)


def _run(options: Options, workers: int, *, force: bool) -> int:
    """Make the data set with whoever was started together with this process."""
    begun, crew = time.monotonic(), crews.find()
    workers = workers or max(1, len(os.sched_getaffinity(0)) // max(1, crew.local_size))
    try:
        with _listening(crew) as stop:
            built = build(options, workers=workers, crew=crew, force=force, wants_stop=stop.is_set)
    except KeyboardInterrupt:
        print("hvdlm preprocess: interrupted; the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    except StoppedError as error:
        if crew.rank == 0 or crew.apart:
            print(f"hvdlm preprocess: {error}", file=sys.stderr, flush=True)
        return _leave(crew, EXIT_REQUEUE)
    except PeerError as error:
        if not crew.apart:
            return _leave(crew, error.exit_code)
        raise
    except UserError as error:
        print(f"hvdlm preprocess: error: {error}", file=sys.stderr, flush=True)
        return _leave(crew, error.exit_code)
    if crew.rank == 0 or crew.apart:
        print(summary(options, built, time.monotonic() - begun))
    return _leave(crew, EXIT_DONE)


@contextlib.contextmanager
def _listening(crew: Crew) -> Iterator[threading.Event]:
    """An event that is set by the signals of a batch system, and shortly before the job's end."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in _SIGNALS}
    # One process of a job asks; its wish to stop reaches the others.
    end = deadline(job_end(os.environ).unix, _STOP_MARGIN_S) if crew.rank == 0 or crew.apart else 0.0
    timer = threading.Timer(max(0.0, end - time.time()), stop.set)
    timer.daemon = True
    if end:
        timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(crew: Crew, exit_code: int) -> int:
    """End MPI together; where another process does not come, its launcher ends it."""
    timer = threading.Timer(_LEAVE_S, os._exit, [exit_code])
    timer.daemon = True
    if exit_code:
        timer.start()
    crew.leave()
    timer.cancel()
    return exit_code


if __name__ == "__main__":
    # Also while it leaves: `srun --kill-on-bad-exit` sends TERM when the first task has left with 75.
    for _number in _SIGNALS:
        signal.signal(_number, signal.SIG_IGN)
    sys.exit(run_command("preprocess", main))
