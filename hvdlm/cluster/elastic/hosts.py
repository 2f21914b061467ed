"""The hosts of the driver's own job: a process is kept on each, which joins the run there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdlm.cluster.bounded import run_bounded
from hvdlm.config import UserError

_ASK_LIMIT_S = 10.0
_FIRST_WAIT_S = 3.0
_LONGEST_WAIT_S = 300.0
_END_LIMIT_S = 15.0
_LOOK_EVERY_S = 15.0
# SLURM_ and SRUN_CPUS_PER_TASK: with one of them a step of one task has no more.
_CPUS_PER_TASK = "_CPUS_PER_TASK"


def own_nodes(env: Mapping[str, str]) -> list[str]:
    """Names of the nodes of this Slurm job; none outside of one.

    Raises:
        UserError: Slurm does not say.
    """
    compressed = env.get("SLURM_JOB_NODELIST", "")
    if not compressed:
        return []
    outcome = run_bounded(["scontrol", "show", "hostnames", compressed], limit_s=_ASK_LIMIT_S)
    if outcome.code != 0:
        raise UserError(f"SLURM_JOB_NODELIST={compressed}: scontrol show hostnames: {outcome.reason}")
    return outcome.output.split()


@final
@dataclass
class _Host:
    node: str
    process: subprocess.Popen[bytes] | None = None
    ends: int = 0
    not_before_s: float = 0.0


@final
class Hosts:
    """Starts `python -m hvdlm.elastic --join RUN` on each node, by srun, and again where it ended.

    Args:
        nodes: of the job; none = this machine alone, without srun.
        run_folder: of the run.
        slots: workers a host.

    Attributes:
        stop_asked: why a signal handler wants the run to stop; '' = it does not.
        draining: nodes of the cluster that their administrator takes out of service.
    """

    def __init__(self, nodes: Sequence[str], run_folder: Path, *, slots: int) -> None:
        self.stop_asked = ""
        self.draining: set[str] = set()
        self._looked_s = time.monotonic()
        self._complained = False
        self._hosts = [_Host(node) for node in nodes or [""]]
        self._command = [sys.executable, "-m", "hvdlm.elastic", "--join", str(run_folder)]
        self._command += ["--slots", str(slots), "--wait-s", "0"]

    def ask_stop(self, reason: str) -> None:
        """For a signal handler."""
        self.stop_asked = self.stop_asked or reason

    def tend(self, *, wanted: bool) -> None:
        """See which have ended, and start them again after a while, where they are wanted."""
        now_s = time.monotonic()
        for host in self._hosts:
            if host.process and host.process.poll() is not None:
                host.process = None
                host.ends += 1
                host.not_before_s = now_s + min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (host.ends - 1))
            free = wanted and host.process is None and host.node not in self.draining
            if free and now_s >= host.not_before_s:
                host.process = self._start(host.node)
        if self._hosts[0].node and now_s - self._looked_s > _LOOK_EVERY_S:
            self._looked_s = now_s
            # In a thread: a busy controller may take its time.
            threading.Thread(target=self._look, name="nodes", daemon=True).start()

    def close(self, *, limit_s: float = _END_LIMIT_S) -> None:
        """Wait for the end of all, and end those that do not."""
        give_up_s = time.monotonic() + limit_s
        for process in (host.process for host in self._hosts if host.process):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, give_up_s - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    def _look(self) -> None:
        states = "draining,drained,fail,maint"
        command = ["sinfo", "--noheader", "--Node", f"--states={states}", "--format=%N"]
        outcome = run_bounded(command, limit_s=_ASK_LIMIT_S)
        if outcome.code == 0:
            self.draining = set(outcome.output.split())
        elif not self._complained:
            self._complained = True
            line = f"hvdlm elastic: warning: not known which nodes are being drained: sinfo: {outcome.reason}"
            print(line, file=sys.stderr, flush=True)

    def _start(self, node: str) -> subprocess.Popen[bytes]:
        # No PMI, and no end of the others where one fails. Without --overlap the step would wait for the
        # cores of the batch script's own.
        step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mpi=none"]
        step += ["--no-kill", "--kill-on-bad-exit=0", "--unbuffered"]
        # One task, whose workers share all that the job has of the node.
        step += ["--mem=0", "--cpu-bind=none", "--gpu-bind=none"]
        env = {name: value for name, value in os.environ.items() if not name.endswith(_CPUS_PER_TASK)}
        command = [*step, *self._command] if node else self._command
        # Signals of a terminal are for the driver, which tells the others.
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
