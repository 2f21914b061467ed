"""A worker's side under Horovod's own elastic driver: `horovodrun` with a host discovery script.

Only here does a run open Horovod's listener for changes of hosts, and speak to its rendezvous server, which
takes anything from anybody who reaches it. `python -m hvdlm.elastic` has neither.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, final

from horovod.runner.elastic.worker import WorkerNotificationManager

from hvdlm.cluster.elastic.members import Agent, Worker, place_of, ranked
from hvdlm.comm.launch import Launch
from hvdlm.comm.member import DriverGoneError, address_towards
from hvdlm.comm.rendezvous import gloo_settings
from hvdlm.comm.sockets import Sockets
from hvdlm.comm.store import Store
from hvdlm.config import EXIT_REQUEUE, UserError

_MEET_LIMIT_S = 5.0
_READY_LIMIT_S = 60.0
_POLL_S = 0.05


def is_under_horovod(env: Mapping[str, str]) -> bool:
    """Whether Horovod's elastic driver started this process."""
    return env.get("HOROVOD_ELASTIC") == "1" and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env


@final
class HorovodMember:
    """Asks Horovod's driver for places, and has the ranks deal them out anew among themselves.

    The driver answers when all workers of its present world have asked or ended, and starts new ones only
    then. So a worker asks until everybody it is to meet has come: all start Horovod at one moment, whose
    start-up ends a process that waits too long for a late one.

    Args:
        env: what the driver gave this process.

    Attributes:
        resize: this world should end after the present step.
        stop: why all should save and leave; '' = they should not.
        signals: those that this process should stop for.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, env: Mapping[str, str]) -> None:
        self.resize = False
        self.stop = ""
        self._worlds = 0
        self._place: dict[str, Any] = {}
        self._own_timeout = "HOROVOD_GLOO_TIMEOUT_SECONDS" in env
        port = env["HOROVOD_GLOO_RENDEZVOUS_PORT"]
        self._driver = f"{env['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{port}"
        self._host, self._slot = env["HOROVOD_HOSTNAME"], int(env["HOROVOD_LOCAL_RANK"])
        # Horovod's own would have to know of the ranks that are dealt out here.
        self._store = Store(address_towards(self._driver))
        for number in self.signals:
            # Until a world's own watch hears them, and between worlds.
            signal.signal(number, self._hear)
        self._notifications = WorkerNotificationManager()
        self._notifications.init(
            env["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
            int(port),
            nic=env.get("HOROVOD_GLOO_IFACE"),
            hostname=self._host,
            local_rank=self._slot,
        )
        self._notifications.register_listener(self)

    def on_hosts_updated(self, timestamp: int, update: int) -> None:
        """Called by Horovod's listener: there are other hosts, or other numbers of slots."""
        self.resize = True

    def next_place(self, step: int, *, lost: bool) -> dict[str, Any]:
        """Wait for a place in the next world.

        Args:
            step: the last one that this process's memory holds whole; -1 = none.
            lost: of no interest: the driver sees itself which processes ended.

        Returns:
            What `members.place_of` made.

        Raises:
            DriverGoneError: the driver does not answer.
            UserError: it has no place for this worker any more.
        """
        self._store.forget("")
        try:
            met = None
            while met is None:
                # What is told from here on is news to the answer.
                self.resize = False
                rank, size = self._ask()
                if rank < 0:
                    # Not 0: where the slot is wanted again by the time that Horovod sees this end, 0 would be
                    # taken for that of the whole job.
                    raise UserError(
                        f"{self._host}: Horovod's driver took this slot off, because the discovery script no "
                        "longer names it or a rank of this host was lost; others go on, if there are any",
                        EXIT_REQUEUE,
                    )
                met = self._meet(rank, size, step)
        except (OSError, ValueError) as error:
            raise DriverGoneError from error
        self._worlds += 1
        if rank == 0 and self._worlds == 1:
            _warn_of_one_host(met)
        members = ranked(Worker(str(n), _agent(one), n, step=one["step"]) for n, one in enumerate(met))
        own = next(member for member in members if member.slot == rank)
        self._place = place_of(own, members) | {"meeting": met[members[0].slot]["meeting"]}
        return self._place

    def wait_for_others(self) -> bool:
        """Wait until all ranks of the world are about to start Horovod, which a late one would end.

        Returns:
            Whether they are; False where one of them is gone.
        """
        place, names = self._place, ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
        address, _, path = place["meeting"].partition("/")
        of_rank = f"{path}:{address.rpartition(':')[2]}/rank_and_size/{place['host']}:{place['local_rank']}"
        try:
            # What Horovod asks for when it starts again in a process, with HOROVOD_ELASTIC set.
            _request(address, "PUT", of_rank, ",".join(str(place[name]) for name in names).encode())
            ready = [f"{path}/ready/{rank}" for rank in range(place["size"])]
            _request(address, "PUT", ready[place["rank"]], b"1")
            return _all(address, ready, limit_s=_READY_LIMIT_S) is not None
        except OSError:
            # Its rank 0 is gone.
            return False

    def hang_up_if_broken(self, sockets: Sockets) -> None:
        """Nothing: Horovod's driver tells no worker of another that is gone, so the timeout is short."""

    def settings(self, place: dict[str, Any]) -> tuple[Launch, dict[str, str]]:
        """What a place means for `comm.world.init`: the launch, and environment variables of Horovod."""
        launch = Launch("gloo", place["rank"], place["size"], place["local_rank"], place["local_size"])
        across = (place["cross_rank"], place["cross_size"])
        settings = gloo_settings(launch, place=place["meeting"], host=place["host"], across=across)
        if not self._own_timeout:
            settings["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(5 + launch.size // 16)
        return launch, settings

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.stop = self.stop or f"signal {signal.Signals(number).name}"

    def _ask(self) -> tuple[int, int]:
        """Rank and size in the driver's next world, once all have asked; without a limit, as it knows who is
        still starting, and who died."""
        answer = _request(self._driver, "GET", f"rank_and_size/{self._host}:{self._slot}", limit_s=None)
        rank, size, *_ = answer.split(b",")
        return int(rank), int(size)

    def _meet(self, rank: int, size: int, step: int) -> list[dict[str, Any]] | None:
        """What all workers of a world say of themselves; None where one of them does not come.

        The driver empties this board before each of its worlds.
        """
        own = {"step": step, "host": self._host, "machine": socket.gethostname()}
        own["meeting"] = f"{self._store.place}/{self._worlds + 1}"
        _request(self._driver, "PUT", f"hvdlm/{rank}", json.dumps(own).encode())
        found = _all(self._driver, [f"hvdlm/{other}" for other in range(size)], limit_s=_MEET_LIMIT_S)
        if found is None:
            # So that who comes now does not wait for one that asks again.
            _request(self._driver, "DELETE", f"hvdlm/{rank}")
            return None
        return [json.loads(one) for one in found]


def _all(address: str, paths: list[str], *, limit_s: float) -> list[bytes] | None:
    """What is found under all paths, once it is there; None where something is not in time."""
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        found = [_request(address, "GET", path) for path in paths]
        if all(found):
            return found
        time.sleep(_POLL_S)
    return None


def _request(
    address: str, method: str, path: str, body: bytes | None = None, *, limit_s: float | None = 10.0
) -> bytes:
    """The content of an answer; empty where there is nothing.

    Raises:
        OSError: nobody answers.
    """
    connection = http.client.HTTPConnection(address, timeout=limit_s)
    try:
        connection.request(method, f"/{path}", body)
        response = connection.getresponse()
        content = response.read()
        return content if response.status == http.client.OK else b""
    except http.client.HTTPException as error:
        raise OSError(f"{address}: {error}") from error
    finally:
        connection.close()


def _agent(one: dict[str, Any]) -> Agent:
    """By its machine: of several names for one, Horovod makes several hosts."""
    return Agent(one["machine"], one["machine"], slots=0, job="")


def _warn_of_one_host(met: list[dict[str, Any]]) -> None:
    hosts = {one["host"] for one in met}
    if len(hosts) == 1 and len(met) > 1:
        print(
            f"hvdlm train: warning: all ranks are on the one host {hosts.pop()}, and Horovod gives up the "
            "whole host of a lost rank; so that the others go on, have the script print a name for each "
            "rank, as localhost:1 and 127.0.0.1:1, or use python -m hvdlm.elastic",
            file=sys.stderr,
            flush=True,
        )
