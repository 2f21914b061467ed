"""A host's side of an elastic run: it joins by itself, and runs the workers that the driver wants there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from hvdlm.cluster.elastic.driver import FILE_NAME, PEERS
from hvdlm.comm.member import ELASTIC, WORKER, address_towards, read_told, tell

_BEAT_S = 0.5
_SILENT_S = 20.0
_PR_SET_PDEATHSIG = 1


@final
class Agent:
    """Joins the driver that a run folder names, and serves it until one of them goes.

    Args:
        run_folder: of the run.
        host: how this host is called there.
        slots: workers it runs.
        job: the batch job it is in, or ''.
    """

    def __init__(self, run_folder: Path, *, host: str, slots: int, job: str) -> None:
        self.leaving = ""
        self._path = run_folder / FILE_NAME
        self._peers = run_folder / PEERS
        self._about = {"host": host, "slots": slots, "job": job}
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    def serve(self, wants_to_leave: Callable[[], str]) -> bool:
        """Until the driver says that this host may go, or is gone itself.

        Args:
            wants_to_leave: asked in every round: why this host must go soon, or ''.

        Returns:
            Whether there was a driver.

        Raises:
            OSError: of a worker that cannot be started.
        """
        try:
            told = read_told(self._path)
            (self._peers / address_towards(told["place"])).touch()
        except (OSError, ValueError):
            return False
        name, heard_s = f"{self._about['host']}-{secrets.token_hex(3)}", time.monotonic()
        exited: dict[str, int] = {}
        answered = False
        while True:
            self.leaving = self.leaving or wants_to_leave()
            exited |= self._reap()
            message = {"from": "agent", "agent": name, **self._about}
            try:
                answer = tell(told["place"], message | {"leaving": self.leaving, "exited": exited})
                heard_s, exited, answered = time.monotonic(), {}, True
                if answer["end"]:
                    return True
                self._run(answer["run"], told, name)
            except OSError:
                # Workers without a driver save and leave by themselves.
                if not self._workers and (time.monotonic() - heard_s > _SILENT_S or self._is_other(told)):
                    return answered
            time.sleep(_BEAT_S)

    def close(self) -> None:
        """End all workers."""
        for process in self._workers.values():
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()

    def _is_other(self, told: dict[str, Any]) -> bool:
        """Whether the run has another driver by now, or none."""
        try:
            return read_told(self._path) != told
        except (OSError, ValueError):
            return True

    def _reap(self) -> dict[str, int]:
        ended = {name: code for name, p in self._workers.items() if (code := p.poll()) is not None}
        for name in ended:
            del self._workers[name]
        return ended

    def _run(self, wanted: list[str], told: dict[str, Any], name: str) -> None:
        """Have exactly these workers alive."""
        for worker, process in self._workers.items():
            if worker not in wanted:
                # Given up by the driver, for its silence say.
                process.kill()
        for worker in wanted:
            if worker not in self._workers and worker.startswith(f"{name}."):
                self._workers[worker] = _start(told, self._path, worker=worker)


def _start(told: dict[str, Any], path: Path, *, worker: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, ELASTIC: str(path.resolve()), WORKER: worker}
    # What a launcher said of this process is not true of the worker.
    env = {k: v for k, v in env.items() if not k.startswith(("SLURM_STEP", "PMI", "OMPI_"))}
    return subprocess.Popen(
        [sys.executable, *told["command"]],
        cwd=told["cwd"],
        env=env,
        stdin=subprocess.DEVNULL,
        # Signals are for the agent, which passes on what is meant for its workers.
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
