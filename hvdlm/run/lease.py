"""One run folder, one run: a heartbeat in the folder, which a second start sees."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, final

import psutil

from hvdlm.config import EXIT_CRASH, UserError

FILE_NAME = "alive.json"

_BEAT_S = 2.0
_SILENT_S = 8.0  # So long without a beat, and a run on another host is dead.
_WAIT_S = 20.0  # An orphan saves and leaves within ten seconds.
_POLL_S = 0.25


@final
class Lease:
    """The right to train in a run folder, kept by a thread that rewrites a small file every two seconds.

    Rank 0 alone holds one. A holder that died on this host is known by its process id; one of another
    host by its silence, without comparing clocks. The file is opened anew for each look, because NFS
    shows what others wrote only then.

    Args:
        run_folder: exists.

    Attributes:
        token: tells this holder from others.

    Raises:
        UserError: after 20 s another start of the same run is still alive.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._path = run_folder / FILE_NAME
        self.token = secrets.token_hex(8)
        self._beats = 0
        _wait_for_end(self._path)
        # One that begins at the same moment is told the same as one that comes later.
        while not self._create():
            _wait_for_end(self._path)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before something is committed: is the run still this start's?

        Raises:
            UserError: another start took over, because this one was silent for too long.
        """
        check(self._run_folder, self.token)

    def release(self) -> None:
        """End the heartbeat and give the folder free."""
        self._closing.set()
        self._thread.join()
        if _read(self._path).get("token") == self.token:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(
                f"{self._run_folder}: cannot be written: {error.strerror}; choose another train.out"
            ) from error
        with os.fdopen(fd, "wb") as file:
            file.write(self._record())
        return True

    def _beat(self) -> None:
        while not self._closing.wait(_BEAT_S):
            self._beats += 1
            # A file server that hiccups must not end a run: the next beat may come through.
            try:
                if _read(self._path).get("token") == self.token:
                    with self._path.open("r+b") as file:
                        file.write(self._record())
            except OSError:
                continue

    def _record(self) -> bytes:
        """Always of one length, so that a reader never sees the rest of an older one."""
        record = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_unix": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "beats": f"{self._beats:012d}",
        }
        return (json.dumps(record) + "\n").encode()


@final
class BorrowedLease:
    """The right to train in a run folder that another process keeps for this one.

    Args:
        run_folder: of the run.
        token: of the other's `Lease`.
    """

    def __init__(self, run_folder: Path, token: str) -> None:
        self._run_folder = run_folder
        self._token = token

    def check(self) -> None:
        """As `Lease.check`."""
        check(self._run_folder, self._token)

    def release(self) -> None:
        """Nothing: it is the other's."""


def check(run_folder: Path, token: str) -> None:
    """See that a run folder is still its holder's.

    Raises:
        UserError: another start took it over.
    """
    holder = _read(run_folder / FILE_NAME)
    if holder.get("token", token) != token:
        raise UserError(
            f"{run_folder}: another start ({_describe(holder)}) took this run over, so this one saves "
            "nothing more and ends",
            EXIT_CRASH,
        )


def holding_job(run_folder: Path) -> str:
    """The Slurm job that has a run folder, or had it when it died; '' where none has."""
    return str(_read(run_folder / FILE_NAME).get("job", ""))


def _wait_for_end(path: Path) -> None:
    """Return once nobody holds the folder, having taken a dead holder's file away."""
    give_up, seen, seen_at = time.monotonic() + _WAIT_S, _read(path), time.monotonic()
    if path.exists() and not _is_dead(seen, 0.0):
        print(
            f"hvdlm train: {path.parent}: another start ({_describe(seen)}) was training here; waiting up to "
            f"{_WAIT_S:.0f} s for its end",
            file=sys.stderr,
            flush=True,
        )
    while path.exists():
        holder = _read(path)
        if holder != seen:
            seen, seen_at = holder, time.monotonic()
        silent_s = time.monotonic() - seen_at
        if _is_dead(holder, silent_s):
            _take_away(path, holder)
        elif time.monotonic() > give_up:
            raise UserError(
                f"{path.parent}: is being trained by another start ({_describe(holder)}); wait for its end, "
                f"or end it: touch {path.parent / 'STOP'}",
                EXIT_CRASH,
            )
        else:
            time.sleep(_POLL_S)


def _is_dead(holder: dict[str, Any], silent_s: float) -> bool:
    if holder.get("host") != socket.gethostname():
        return silent_s > _SILENT_S
    try:
        process = psutil.Process(int(holder["pid"]))
        return abs(process.create_time() - float(holder["started_unix"])) > 1.0 or (
            process.status() == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return silent_s > _SILENT_S


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove a dead holder's file, and not that of a start which was faster to do so."""
    aside = path.with_name(f"{FILE_NAME}.{secrets.token_hex(8)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside).get("token") != holder.get("token"):
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on {holder.get('host', '?')}"
