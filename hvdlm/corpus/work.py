"""The folder where the processes that make one data set meet: claims, results, signs of life, failures.

Nothing but files, so that the ranks of a job, the elements of a job array and the next start after a
crash work together in the same way. A task's result follows from the plan alone and appears by one
rename: a claim only spares double work, it never decides what is right.

    done/STAGE/00012.json               results; they outlive a crash
    starts/NAME/claims/STAGE/00012      who does a task, made with O_CREAT | O_EXCL
    starts/NAME/alive/00003.json        one process's sign of life (`signs.py`)
    starts/NAME/failed.json             what ended this start
    starts/NAME/stopped                 somebody was asked to stop; an element of an array stops alone
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.signs import Signs
from hvdlm.data.files import RECORD_NAME, TEMP_PREFIX, fsync, write_atomic

LEASE_S = 180.0
"""Without a sign of life for so long, a process's claims are free: NFS may show times a minute old."""
_CHECK_EVERY_S = 0.5
_PASSING = frozenset({"open"})
"""Stages that every start does anew."""


class StoppedError(UserError):
    """This start was asked to stop; what is done is kept."""


class PeerError(UserError):
    """Another process of this start failed and has said so."""


class GoneError(Exception):
    """The folder is gone: another process has completed the data set."""


@final
class Work:
    """One process's view of the folder. A context manager: within it the process gives signs of life.

    Args:
        folder: made here with what is in it.
        crew: who works together.
        wants_stop: whether this process was asked to stop.
    """

    def __init__(self, folder: Path, crew: Crew, wants_stop: Callable[[], bool]) -> None:
        self.folder, self.crew = folder, crew
        self._wants_stop = wants_stop
        self._start = folder / "starts" / crew.name
        self._checked_at = 0.0
        self._waiting: dict[str, list[int]] = {}
        for path in (folder / "done", self._start / "claims"):
            path.mkdir(parents=True, exist_ok=True)
        # Open, so that no folder made later gets the same inode number.
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._close = weakref.finalize(self, os.close, self._fd)
        self.signs = Signs(folder / "starts", crew.name, crew.rank)
        self._rejoin()

    def __enter__(self) -> Work:
        self.signs.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.signs.__exit__()
        self._close()

    def is_gone(self) -> bool:
        """Whether the folder is gone; one that a late process has made in its place is another."""
        try:
            return not os.path.samestat(os.fstat(self._fd), self.folder.stat())
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError as error:
            if error.errno == errno.ESTALE:
                return True
            raise

    def confirm(self) -> None:
        """Look whether the folder is still there.

        Raises:
            GoneError: the data set is complete.
        """
        if self.is_gone():
            raise GoneError

    def claim(self, stage: str, count: int) -> int | None:
        """Take a task of a stage that is neither done nor claimed.

        Args:
            stage: its name.
            count: tasks it has.

        Returns:
            The task's index; None where there is none to be had now.

        Raises:
            GoneError: the data set is complete.
        """
        waiting = self._waiting.get(stage)
        if not waiting:
            waiting = self._waiting[stage] = self._free(stage, count)
        while waiting:
            # Everybody begins somewhere else in the front, so that few reach for the same one.
            index = waiting.pop(random.randrange(min(len(waiting), 2 * max(self.crew.size, 1))))
            if self._take(stage, index):
                return index
        return None

    def finish(self, stage: str, index: int, result: dict[str, Any]) -> None:
        """Keep the result of a task.

        Raises:
            UserError: the disk is full.
        """
        self.confirm()
        write_atomic(self._done(stage) / f"{index:05d}.json", (json.dumps(result) + "\n").encode())

    def complete(self, stage: str, count: int) -> bool:
        """Whether all tasks of a stage are done."""
        return len(self._names(self._done(stage))) >= count

    def is_done(self, stage: str, index: int) -> bool:
        """Whether one task is done."""
        return (self._done(stage) / f"{index:05d}.json").exists()

    def result(self, stage: str, index: int) -> dict[str, Any]:
        """The result of a task that is done.

        Raises:
            GoneError: the data set is complete.
        """
        path = self._done(stage) / f"{index:05d}.json"
        try:
            result: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise GoneError from error
        self.confirm()
        return result

    def done(self, stage: str) -> list[int]:
        """Indices of the tasks of a stage that are done, rising."""
        return sorted(int(name.removesuffix(".json")) for name in self._names(self._done(stage)))

    def forget(self, stage: str, index: int) -> None:
        """Drop the result of a task, so that it is done again."""
        (self._done(stage) / f"{index:05d}.json").unlink(missing_ok=True)

    def check(self) -> None:
        """Look, twice a second at most, whether this start shall end.

        Raises:
            StoppedError: this or another process was asked to stop.
            PeerError: another process failed.
        """
        stops = self._wants_stop()
        if not stops and time.monotonic() - self._checked_at < _CHECK_EVERY_S:
            return
        self._checked_at = time.monotonic()
        # First: where one task has failed, srun's TERM asks the others to stop.
        with suppress(FileNotFoundError, ValueError):
            failure = json.loads((self._start / "failed.json").read_bytes())
            raise PeerError(f"process {failure['rank']} failed: {failure['error']}", failure["exit_code"])
        if stops and not self.crew.apart:
            with suppress(OSError):
                (self._start / "stopped").touch()
        # An element of an array is of the same start when it is requeued: no mark may stop it again.
        if stops or (self._start / "stopped").exists():
            raise StoppedError("stopped; the same command goes on from there")

    def fail(self, error: UserError) -> None:
        """Tell the others what went wrong here; the first to do so is the one they name."""
        record = {"rank": self.crew.rank, "error": str(error), "exit_code": error.exit_code}
        # A full disk: the others will meet it too. What is half written is no JSON, and read again.
        with suppress(OSError), (self._start / "failed.json").open("x") as file:
            file.write(json.dumps(record))

    def begin_anew(self) -> None:
        """Remove what other starts left: everything, since it is of another data set.

        The record first: what a crash leaves of the rest must not be taken for that data set's.
        """
        (self.folder / RECORD_NAME).unlink(missing_ok=True)
        fsync(self.folder)
        for path in self.folder.iterdir():
            if path.name != "starts":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / "done").mkdir(exist_ok=True)

    def remove_leftovers(self) -> None:
        """Remove the claims of starts that are over, and files that nobody finished."""
        for path in (self.folder / "starts").iterdir():
            if path != self._start:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder at once: whoever looks into it afterwards knows that the work is over."""
        gone = self.folder.with_name(f"{self.folder.name}.gone-{self.crew.rank}")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _rejoin(self) -> None:
        """Take back what a process of this number has left: it was started again, as part of a job array."""
        for claim in (self._start / "claims").glob("*/*"):
            if _owner(claim) == self.crew.rank:
                claim.unlink(missing_ok=True)
        with suppress(FileNotFoundError, ValueError):
            failure = self._start / "failed.json"
            if json.loads(failure.read_bytes())["rank"] == self.crew.rank:
                failure.unlink()

    def _done(self, stage: str) -> Path:
        return (self._start if stage in _PASSING else self.folder) / "done" / stage

    def _names(self, folder: Path) -> list[str]:
        """What is in a folder of the work; unfinished files left out."""
        self.confirm()
        try:
            return [path.name for path in folder.iterdir() if not path.name.startswith(TEMP_PREFIX)]
        except FileNotFoundError:
            self.confirm()
            folder.mkdir(parents=True, exist_ok=True)
            return []

    def _free(self, stage: str, count: int) -> list[int]:
        done = {int(name.removesuffix(".json")) for name in self._names(self._done(stage))}
        open_tasks = [index for index in range(count) if index not in done]
        claims = self._start / "claims" / stage
        claimed = {int(name) for name in self._names(claims)} if open_tasks else set()
        free = [index for index in open_tasks if index not in claimed]
        return free or [i for i in open_tasks if i in claimed and self._is_abandoned(claims / f"{i:05d}")]

    def _take(self, stage: str, index: int) -> bool:
        path = self._start / "claims" / stage / f"{index:05d}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise GoneError from error
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; free space", EXIT_CRASH) from error
        with os.fdopen(fd, "w") as file:
            file.write(str(self.crew.rank))
        return True

    def _is_abandoned(self, claim: Path) -> bool:
        """Whether a claim's owner gave no sign of life for a lease; the claim is then removed."""
        owner = _owner(claim)
        if owner == self.crew.rank:
            return False
        try:
            abandoned = self.signs.age_s(owner, claim) > LEASE_S
        except FileNotFoundError:
            return False
        if abandoned:
            claim.unlink(missing_ok=True)
        return abandoned


def _owner(claim: Path) -> int | None:
    try:
        return int(claim.read_text())
    except (OSError, ValueError):
        return None
