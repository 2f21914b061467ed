"""When a run should stop: signals, the STOP file, the job's end time, a dead launcher; or save: SAVE."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import final

import psutil

from hvdlm.run import exit_record

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "STOP"
SAVE_FILE = "SAVE"

_POLL_S = 0.5
_ORPHAN_GRACE_S = 10.0
_LAUNCHERS = {
    *("mpirun", "mpiexec", "horovodrun", "slurmstepd"),
    *("orterun", "orted", "prterun", "prted", "prte"),
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
}


@final
class StopWatch:
    """A thread that notes why this rank should stop, or save; the loop asks once a step.

    Signals reach the thread through a wake-up socket, so that a rank that hangs in a collective
    still hears them: a second Ctrl-C ends the process, and so does any stop signal once another
    rank of this attempt has failed. A rank whose launcher died saves and leaves; one that has not
    done so ten seconds later is ended.

    Args:
        run_folder: where STOP, SAVE and failure records are looked for.
        attempt: number of this start of the run.
        watch_file: look for STOP and SAVE (rank 0 alone does, to spare the file system).
        deadline_unix: when to stop by itself, in seconds since 1970; 0 = never.
        signals: those that mean this rank; for others, what handlers there are stay.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        attempt: int,
        watch_file: bool,
        deadline_unix: float,
        signals: tuple[signal.Signals, ...] = SIGNALS,
    ) -> None:
        self.reason: str | None = None
        self._run_folder = run_folder
        self._attempt = attempt
        self._watch_file = watch_file
        self._deadline_unix = deadline_unix
        self._launchers = launchers()
        self._interrupts = 0
        self._orphaned_at = 0.0
        self._save_wanted = False
        self._save_lock = threading.Lock()
        self._closing = threading.Event()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        # The handler does nothing: without one the default action would end the process.
        self._old_handlers = {s: signal.signal(s, lambda *_: None) for s in signals}
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()

    @property
    def requested(self) -> bool:
        """This rank wants to stop."""
        return self.reason is not None

    @property
    def save_requested(self) -> bool:
        """This rank wants a checkpoint."""
        return self._save_wanted

    def ask(self, reason: str) -> None:
        """Note why somebody else wants this rank to stop; '' = nobody does."""
        self.reason = self.reason or reason or None

    def take_save_file(self) -> bool:
        """Remove SAVE, as a checkpoint was committed; whether it was there."""
        with self._save_lock:
            self._save_wanted = False
            try:
                (self._run_folder / SAVE_FILE).unlink()
            except FileNotFoundError:
                return False
            return True

    def close(self) -> None:
        """Put the old handlers back and end the thread."""
        self._closing.set()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._wake_sender.send(b"\0")
        self._thread.join()
        self._wake_sender.close()
        self._wake_receiver.close()

    def _watch(self) -> None:
        while not self._closing.is_set():
            ready, _, _ = select.select([self._wake_receiver], [], [], _POLL_S)
            for number in self._wake_receiver.recv(64) if ready else b"":
                self._hear(number)
            self._look_around()

    def _hear(self, number: int) -> None:
        if number not in self._old_handlers:
            return
        self.reason = self.reason or f"signal {signal.Signals(number).name}"
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 2:
            os._exit(130)

    def _look_around(self) -> None:
        now = time.time()
        if self._watch_file and _exists(self._run_folder / STOP_FILE):
            self.reason = self.reason or f"file {self._run_folder / STOP_FILE}"
        if self._watch_file:
            # Else a look from before the file was removed would save once more.
            with self._save_lock:
                self._save_wanted = _exists(self._run_folder / SAVE_FILE)
        if self._deadline_unix and now >= self._deadline_unix:
            self.reason = self.reason or "the job's time is nearly over"
        if not self._orphaned_at and any(not _alive(p) for p in self._launchers):
            self.reason = self.reason or "the launcher died"
            self._orphaned_at = now
        if self._orphaned_at and now - self._orphaned_at > _ORPHAN_GRACE_S:
            os._exit(1)
        if self.requested and self._peer_failed():
            os._exit(1)

    def _peer_failed(self) -> bool:
        try:
            return bool(exit_record.failures(self._run_folder, self._attempt))
        except OSError:
            return False


def launchers() -> list[psutil.Process]:
    """The ancestors of this process that launched it: mpirun, horovodrun, a Slurm step.

    horovodrun replaces itself by `sh -c "mpirun …"`, so the first word of a shell's command counts.
    """
    found = []
    for process in psutil.Process().parents():
        try:
            words = [process.name(), *(word.split(" ", 1)[0] for word in process.cmdline()[:3])]
        except psutil.Error:
            continue
        if _LAUNCHERS & {Path(word).name for word in words}:
            found.append(process)
    return found


def is_wish(reason: str) -> bool:
    """Whether a run that stopped for this reason was stopped by its file STOP: somebody wants it to rest."""
    return reason.startswith("file ")


def deadline(job_end_unix: float, margin_s: float) -> float:
    """When to stop before the job ends, in seconds since 1970; 0 where the job has no end."""
    return job_end_unix - margin_s if job_end_unix else 0.0


def _exists(path: Path) -> bool:
    """Whether a file is there, as far as can be told: a file server that hiccups must not end a run."""
    try:
        return path.exists()
    except OSError:
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
