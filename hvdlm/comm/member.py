"""A worker's side of an elastic run: it tells the driver how it is, and is told what world it is in."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, final

from hvdlm.comm.launch import Launch
from hvdlm.comm.rendezvous import gloo_settings
from hvdlm.comm.sockets import Sockets, hang_up

ELASTIC = "HVDLM_ELASTIC"
"""Environment variable of a worker: path of the file that says where the driver is."""
WORKER = "HVDLM_WORKER"
"""Environment variable of a worker: its name."""

_BEAT_S = 0.5
_WAITING_BEAT_S = 0.1
_REQUEST_LIMIT_S = 5.0
_SILENT_S = 20.0


class DriverGoneError(Exception):
    """The driver was not heard of for too long."""


def tell(place: str, message: dict[str, Any], *, limit_s: float = _REQUEST_LIMIT_S) -> dict[str, Any]:
    """Send a message to the driver.

    Args:
        place: "IP:PORT/KEY" of its `Store`.
        message: in JSON.
        limit_s: for each step of the exchange.

    Returns:
        Its answer.

    Raises:
        OSError: it cannot be reached, or knows another key.
    """
    address, _, key = place.partition("/")
    connection = http.client.HTTPConnection(address, timeout=limit_s)
    try:
        connection.request("POST", f"/{key}/tell", json.dumps(message))
        answer = json.loads(connection.getresponse().read())
        if not isinstance(answer, dict):
            raise OSError(f"{address}: no answer of a driver")
        return answer
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{address}: {error}") from error
    finally:
        connection.close()


@final
class Member:
    """Keeps a driver informed, in a thread, and hears of the next world.

    Args:
        told: what the driver wrote for its workers: `place`, `host`.
        name: this worker's.

    Attributes:
        resize: this world should end after the present step.
        stop: why all should save and leave; '' = they should not.
        generation: the world this worker is in, or was in last; 0 = none.
        signals: those that this process should stop for. None: Slurm's go to every process of a node, and
            its agent hears them, who knows whether they mean the host or the whole run.
    """

    signals: tuple[signal.Signals, ...] = ()

    def __init__(self, told: dict[str, Any], name: str) -> None:
        self.resize = False
        self.stop = ""
        self.generation = 0
        self._store = told["place"]
        self._name = name
        self._step = -1
        self._lost = False
        self._prepared = False
        self._waiting = False
        self._sockets: Sockets = {}
        self._answer: dict[str, Any] = {}
        self._heard_s = time.monotonic()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._answered = threading.Condition()
        threading.Thread(target=self._beat, name="member", daemon=True).start()

    def next_place(self, step: int, *, lost: bool) -> dict[str, Any] | None:
        """Wait for a place in the next world.

        Args:
            step: the last one that this process's memory holds whole; -1 = none.
            lost: the world before ended because another rank was gone.

        Returns:
            What `cluster.elastic.members.place_of` made, and `generation`; None where there is no world
            for this worker any more.

        Raises:
            DriverGoneError: the driver is not heard of.
        """
        with self._lock:
            self._step, self._lost, self._prepared, self._waiting = step, lost, False, True
            self._sockets = {}
        self._wake.set()
        with self._answered:
            while True:
                self._answered.wait(1.0)
                place = self._answer.get("place")
                if place and place["generation"] > self.generation:
                    with self._lock:
                        self.generation, self._waiting = place["generation"], False
                        self.resize, self._lost, self._answer = False, False, {}
                    return dict(place)
                if self._answer.get("leave"):
                    return None
                if time.monotonic() - self._heard_s > _SILENT_S:
                    raise DriverGoneError

    def wait_for_others(self) -> bool:
        """Wait until all ranks of the world are about to start Horovod, which a late one would end.

        Returns:
            Whether they are; False where one of them is gone.

        Raises:
            DriverGoneError: the driver is not heard of.
        """
        with self._answered:
            with self._lock:
                self._prepared, self._answer = True, {}
            self._wake.set()
            while not self._answer.get("go"):
                if self._answer.get("broken") or self._answer.get("leave"):
                    return False
                if time.monotonic() - self._heard_s > _SILENT_S:
                    raise DriverGoneError
                self._answered.wait(1.0)
        return True

    def hang_up_if_broken(self, sockets: Sockets) -> None:
        """From now on shut these connections down as soon as the driver knows that a rank is gone.

        Args:
            sockets: those to the other ranks of this world.
        """
        with self._lock:
            self._sockets = sockets

    def settings(self, place: dict[str, Any]) -> tuple[Launch, dict[str, str]]:
        """What a place means for `comm.world.init`: the launch, and environment variables of Horovod."""
        launch = Launch("gloo", place["rank"], place["size"], place["local_rank"], place["local_size"])
        across = (place["cross_rank"], place["cross_size"])
        store = f"{self._store}/{place['generation']}"
        return launch, gloo_settings(launch, place=store, host=place["host"], across=across)

    def _beat(self) -> None:
        while True:
            with self._lock:
                message = {
                    "worker": self._name,
                    "generation": self.generation,
                    "waiting": self._waiting,
                    "prepared": self._prepared,
                    "lost": self._lost,
                    "step": self._step,
                }
            try:
                self._hear(message, tell(self._store, {"from": "worker", **message}))
            except OSError:
                if time.monotonic() - self._heard_s > _SILENT_S:
                    self.stop = self.stop or "the elastic driver is gone"
            in_a_world = self._prepared and self._answer.get("go")
            self._wake.wait(_BEAT_S if in_a_world else _WAITING_BEAT_S)
            self._wake.clear()

    def _hear(self, message: dict[str, Any], answer: dict[str, Any]) -> None:
        with self._answered, self._lock:
            self._heard_s = time.monotonic()
            # An answer to what was said in an earlier world is none to this one.
            names = ("generation", "prepared", "waiting")
            if [message[name] for name in names] == [self.generation, self._prepared, self._waiting]:
                self._answer = answer
                self.resize = bool(answer.get("resize"))
                self.stop = self.stop or str(answer.get("stop", ""))
                if answer.get("broken") and self._prepared:
                    hang_up(self._sockets)
            self._answered.notify_all()


def read_told(path: Path) -> dict[str, Any]:
    """What a driver wrote of itself.

    Raises:
        OSError: there is none.
        ValueError: it is not whole.
    """
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def address_towards(place: str) -> str:
    """This host's address on the way to a driver; nothing is sent."""
    host, _, port = place.partition("/")[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
