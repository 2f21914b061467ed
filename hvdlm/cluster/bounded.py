"""Child processes with a hard time limit: nothing they start outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

MARK = "HVDLM_BOUNDED_CHILD"
"""The variable by which a child and what it starts are known."""
# A launcher started inside a rank takes that rank's place in the outer job, and hangs.
_RANK_PREFIXES = ("OMPI_COMM_", "OMPI_UNIVERSE_", "PMIX_", "PMI_", "PRTE_", "HOROVOD_RANK", "HOROVOD_SIZE")


@final
@dataclass(frozen=True)
class Outcome:
    """What came of a child process."""

    code: int | None
    """Exit status; None where it did not start or ran past its limit."""
    output: str
    """Its stdout and stderr, in the order written."""
    trouble: str
    """Why there is no exit status; empty where there is one."""

    @property
    def reason(self) -> str:
        """One line that says best why it failed: the trouble, else its last words."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip(" -*\t")]
        errors = [line for line in lines if "rror" in line]
        words = (errors or lines or ["no output"])[-1][:200]
        return self.trouble or f"exit {self.code}: {words}"


def run_bounded(
    command: Sequence[str], *, limit_s: float, more_env: Mapping[str, str] | None = None
) -> Outcome:
    """Runs a command without stdin; past its limit ends it and everything it started.

    Args:
        command: Program and arguments.
        limit_s: Seconds after which all its processes are killed.
        more_env: Environment variables on top of this process's own.

    Returns:
        The outcome; a program that is missing or cannot start is one too.
    """
    mark = uuid.uuid4().hex
    env = {k: v for k, v in os.environ.items() if not k.startswith(_RANK_PREFIXES)}
    env |= {**(more_env or {}), MARK: mark}
    # In memory and not a pipe: an orphan that keeps a pipe open would keep its reader waiting.
    with os.fdopen(os.memfd_create("output"), "w+b") as sink:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env, start_new_session=True
            )
        except OSError as error:
            return Outcome(None, "", f"cannot run {command[0]}: {error.strerror}")
        code, trouble = None, ""
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            trouble = f"no end within {limit_s:g} s"
        finally:
            _end_all(mark)
            child.wait()
        sink.seek(0)
        return Outcome(code, sink.read().decode(errors="replace"), trouble)


def _end_all(mark: str) -> None:
    """Kills every process with the mark; launchers put ranks into sessions of their own."""
    deadline = time.monotonic() + 5
    while (alive := list(_marked(mark))) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: str) -> Iterable[int]:
    entry = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
