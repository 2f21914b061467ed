"""One start at a time writes to a folder: the others learn in one line that they are too many."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hvdlm.config import EXIT_CRASH, EXIT_USAGE, UserError
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.signs import sign_of_life
from hvdlm.corpus.work import PeerError, StoppedError, Work
from hvdlm.data import manifest as manifests

_POLL_S = 0.1
_TOUCHED_S = 2.0
"""The other ranks touch the lock for an instant when they look at it."""
_SEEN_S = 60.0
"""By when a file is seen on another node: NFS may keep for a minute that there is none."""
_MEETING_S = 300.0
_FRESH_S, _LISTEN_S = 60.0, 15.0


@contextmanager
def claimed(
    folder: Path, work: str, *, wait: bool, crew: Crew, wants_stop: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Make a folder and hold it against other starts; the hold dies with the process.

    Args:
        folder: made with its parents; removed again if it stays empty.
        work: name of the folder in it where a crew meets.
        wait: wait for another start to end instead of refusing.
        crew: rank 0 of a job holds it for all, and the others wait until it does; the elements of a
            job array hold it together.
        wants_stop: asked while waiting for rank 0.

    Yields:
        Whether no other start can be at work there; if not, ask `refuse_others`.

    Raises:
        UserError: it cannot be made, or another start holds it.
    """
    holds = crew.apart or crew.rank == 0
    fd = _open(folder)
    try:
        if holds:
            fd, surely = _hold(folder, fd, wait=wait, crew=crew)
        else:
            surely = True
            _follow(fd, folder, sign_of_life(folder / work / "starts", crew.name, 0), wants_stop)
        try:
            yield surely
        finally:
            # Still under the lock: else this could take the folder from under the next start.
            with suppress(OSError):
                if holds:
                    folder.rmdir()
    finally:
        os.close(fd)


def refuse_others(folder: Path, work: Work) -> None:
    """Refuse where another start gives signs of life, for folders that a lock does not keep apart.

    Raises:
        UserError: another start is at work.
    """
    before = work.signs.of_others(within_s=_FRESH_S)
    end = time.monotonic() + _LISTEN_S
    while before and time.monotonic() < end:
        work.check()
        now = work.signs.of_others(within_s=_FRESH_S)
        if any(now[path] != sign for path, sign in before.items() if path in now):
            _refuse(folder)
        time.sleep(_POLL_S)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another --out") from None


def _hold(folder: Path, fd: int, *, wait: bool, crew: Crew) -> tuple[int, bool]:
    """Lock the folder; its descriptor, and whether that keeps every other start away."""
    kind = fcntl.LOCK_SH if crew.apart else fcntl.LOCK_EX
    end = time.monotonic() + (_TOUCHED_S if crew.size > 1 else 0.0)
    while True:
        surely = not crew.apart
        try:
            fcntl.flock(fd, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(_POLL_S)
                continue
            _refuse(folder)
        except OSError:
            surely = False  # Some network file systems lock no folders.
        if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
            return fd, surely
        # The start that held it failed and removed it.
        os.close(fd)
        fd = _open(folder)


def _follow(fd: int, folder: Path, sign: Path, wants_stop: Callable[[], bool]) -> None:
    """Wait until rank 0 has the folder: before, whatever is in it may be another start's.

    Raises:
        UserError: another start has it, or rank 0 does not come.
    """
    begun, held_since = time.monotonic(), None
    while not sign.exists():
        now, stops = time.monotonic(), wants_stop()
        held_since = (held_since or now) if _is_held(fd) else None
        if held_since and (stops or now - held_since > _SEEN_S):
            # A stop too: srun's TERM, since rank 0 has left.
            raise PeerError("rank 0 was refused", EXIT_USAGE)
        if not held_since and (folder / manifests.FILE_NAME).exists():
            return
        if stops:
            raise StoppedError("stopped; the same command goes on from there")
        if now - begun > _MEETING_S:
            raise UserError(f"{folder}: rank 0 did not come in {_MEETING_S:.0f} s; run again", EXIT_CRASH)
        time.sleep(_POLL_S)


def _is_held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _refuse(folder: Path) -> NoReturn:
    raise UserError(f"{folder}: another program writes there; wait for it, or choose another --out")
