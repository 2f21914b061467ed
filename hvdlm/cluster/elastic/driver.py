"""The driver of an elastic run: it hears hosts and workers, and says which world comes next."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from hvdlm.cluster.elastic.members import Policy
from hvdlm.cluster.elastic.roster import Roster
from hvdlm.comm.rendezvous import write_told
from hvdlm.comm.store import Store

FILE_NAME = "elastic.json"
"""In the run folder, for its owner alone: where the driver is, and the key."""
PEERS = "elastic-peers"
"""In the run folder: files named by the addresses of hosts that want to join."""


@final
class Driver:
    """Serves a run until it has ended.

    Args:
        run_folder: exists, and is seen by all hosts.
        address: of this host, on the network that the hosts share; only this one is bound.
        command: what a worker runs, after the interpreter.
        policy: limits.
        job: the batch job of this process, or ''.
        token: of the run's lease, which the driver holds for its workers.
    """

    def __init__(
        self, run_folder: Path, address: str, command: list[str], *, policy: Policy, job: str, token: str
    ) -> None:
        self.roster = Roster(policy, job=job, now_s=time.monotonic())
        self._peers = run_folder / PEERS
        self._peers.mkdir(exist_ok=True)
        for stale in self._peers.iterdir():
            stale.unlink()
        self._known = {address, "127.0.0.1"} if address == "127.0.0.1" else {address}
        self._looked_s = 0.0
        self._store = Store(address, self._hear, is_peer=self._is_peer)
        self._path = run_folder / FILE_NAME
        self._told = {"place": self._store.place, "host": socket.gethostname(), "pid": os.getpid()}
        self._told |= {"command": command, "cwd": str(Path.cwd()), "token": token}
        write_told(self._path, self._told)

    def run(self, *, say: Callable[[str], None], tend: Callable[[], None], poll_s: float = 0.2) -> int:
        """Until the run has ended and the workers are gone.

        Args:
            say: prints a line.
            tend: called in every round; starts what has to be started.
            poll_s: seconds between looks.

        Returns:
            Exit code of the run.
        """
        generation = 0
        while True:
            tend()
            with self._store.lock:
                self.roster.look(time.monotonic())
                news, self.roster.news = self.roster.news, []
                present = self.roster.generation
                # Hosts that are still there have not heard of it.
                over = self.roster.end_code is not None and not (self.roster.workers or self.roster.agents)
            for line in news:
                say(line)
            if present > generation + 1:
                # What Gloo left of worlds that are over.
                self._store.forget(f"{generation}:")
                generation += 1
            if over:
                return self.roster.end_code or 0
            time.sleep(poll_s)

    def drain(self, hosts: set[str]) -> None:
        """Have hosts leave that are being taken out of service."""
        with self._store.lock:
            self.roster.drain(hosts, "its node is being drained")

    def stop(self, reason: str) -> None:
        """Have all workers save and leave."""
        with self._store.lock:
            self.roster.stop(reason)

    def close(self) -> None:
        """Stop serving; who asks later finds nobody."""
        self._path.unlink(missing_ok=True)
        self._store.close()

    def _hear(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("from") == "agent":
            return self.roster.hear_agent(message, time.monotonic())
        answer = self.roster.hear_worker(message, time.monotonic())
        if answer["place"]:
            self._publish(answer["place"])
        return answer

    def _publish(self, place: dict[str, Any]) -> None:
        """What Horovod asks for when it starts again in a process, with HOROVOD_ELASTIC set."""
        names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
        key = f"{place['generation']}:{self._store.server_port}/rank_and_size/"
        value = ",".join(str(place[name]) for name in names)
        self._store.put(f"{key}{place['host']}:{place['local_rank']}", value.encode())

    def _is_peer(self, address: str) -> bool:
        """Whether a host with this address has left its name in the run folder."""
        now_s = time.monotonic()
        if address not in self._known and now_s - self._looked_s > 0.5:
            self._looked_s = now_s
            self._known |= {path.name for path in self._peers.iterdir()}
        return address in self._known
