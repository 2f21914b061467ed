"""A line to a process on each node: srun's own stdin and stdout, so that nothing listens on a network.

One step a node, started at once: a node on which srun hangs is one line that does not answer, and no
other node waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

_CLOSE_LIMIT_S = 2.0
_STEP = ("--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--mpi=none", "--cpu-bind=none")
# They ask for the job's tasks and cores; a step without them may use all cores of its node.
_NOT_FOR_STEPS = ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_NPROCS")


@final
@dataclass(frozen=True)
class Answer:
    """What a node said to one question.

    Attributes:
        value: what it said; None where it did not.
        trouble: why not; empty where it did.
        gone: nothing came, so nothing more will be asked.
        sent_unix: when it was asked, in seconds since 1970 by this host's clock.
        received_unix: when the answer was here, by the same clock.
    """

    value: dict[str, Any] | None
    trouble: str = ""
    gone: bool = False
    sent_unix: float = 0.0
    received_unix: float = 0.0


@final
class NodeLine:
    """One node's process.

    Args:
        node: name of the node, as Slurm calls it.
        command: what to start there: it answers a line of JSON by a line of JSON (`cluster.preflight.node`).
    """

    def __init__(self, node: str, command: Sequence[str]) -> None:
        self.node = node
        env = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_STEPS}
        self._errors = os.fdopen(os.memfd_create("errors"), "w+b")
        self._process = subprocess.Popen(
            ["srun", *_STEP, f"--nodelist={node}", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=env,
            start_new_session=True,
        )
        self._heard = b""

    def ask(self, question: str, *, limit_s: float, **details: Any) -> Answer:
        """Put one question.

        Args:
            question: its name.
            limit_s: seconds after which the node has not answered.
            details: whatever the question needs, as JSON.
        """
        give_up = time.monotonic() + limit_s
        sent_unix = time.time()
        try:
            self._write(json.dumps({"question": question, **details}).encode() + b"\n")
            said = self._read(give_up)
        except OSError as error:
            return Answer(None, self._last_words() or f"its process is gone ({error.strerror})", gone=True)
        if said is None:
            return Answer(None, self._last_words() or f"no answer within {limit_s:.0f} s", gone=True)
        if trouble := said.get("trouble"):
            return Answer(None, trouble)
        return Answer(said, sent_unix=sent_unix, received_unix=time.time())

    def close(self) -> None:
        """End the process, by force where it does not go by itself."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _read(self, give_up: float) -> dict[str, Any] | None:
        """The next line of JSON; what a site's prolog prints is passed over."""
        assert self._process.stdout
        out = self._process.stdout.fileno()
        while True:
            line, newline, rest = self._heard.partition(b"\n")
            if newline:
                self._heard = rest
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    if isinstance(said, dict):
                        return said
                continue
            ready, _, _ = select.select([out], [], [], max(0.0, give_up - time.monotonic()))
            more = os.read(out, 1 << 16) if ready else b""
            if not more:
                return None
            self._heard += more

    def _last_words(self) -> str:
        """srun's last line, where it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.5)
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
            words = [line.strip() for line in lines if "rror" in line] or [line for line in lines if line]
            return f"srun ended with {code}: {words[0] if words else 'no output'}"[:300]
        return ""


@final
class Crew:
    """A line to each node; one that does not answer is given up.

    Attributes:
        lost: why a node was given up, by its name.
    """

    def __init__(self, nodes: Sequence[str], command: Sequence[str]) -> None:
        self.lost: dict[str, str] = {}
        self._lines: dict[str, NodeLine] = {}
        self._pool = ThreadPoolExecutor(max_workers=len(nodes))
        try:
            for node in nodes:
                self._lines[node] = NodeLine(node, command)
        except BaseException:
            self.close()
            raise

    @property
    def nodes(self) -> list[str]:
        """Those that have answered so far."""
        return [node for node in self._lines if node not in self.lost]

    def ask(
        self, question: str, *, limit_s: float, details: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, Answer]:
        """Put one question to several nodes at once.

        Args:
            question: its name.
            limit_s: seconds for each.
            details: what it needs, by node; None = nothing, and all nodes are asked.

        Returns:
            The answers, trouble included, of those nodes that were not given up before.
        """
        if details is None:
            details = {node: {} for node in self.nodes}
        asked = {
            node: self._pool.submit(self._lines[node].ask, question, limit_s=limit_s, **details[node])
            for node in self.nodes
            if node in details
        }
        answers = {node: future.result() for node, future in asked.items()}
        for node, answer in answers.items():
            if answer.gone:
                self.lost[node] = f"{question}: {answer.trouble}"
        return answers

    def close(self) -> None:
        """End all of them."""
        list(self._pool.map(NodeLine.close, self._lines.values()))
        self._pool.shutdown()
