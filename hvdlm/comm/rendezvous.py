"""How ranks of one Slurm step find each other without MPI: a key-value store that rank 0 serves.

Horovod's Gloo controller asks for nothing but GET, PUT and DELETE of small values by HTTP. Horovod's own
server binds every interface, takes PUT from anybody and unpickles what it got (CVE-2024-10190); this one
binds one address, answers only to whoever knows a random key, and keeps bytes. The address and the
key lie in a file that only its owner can read.

Source: Horovod 0.28.1, common/gloo/http_store.cc and runner/http/http_server.py (paths and statuses).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import final

from hvdlm.comm.launch import Launch, tasks_of_nodes
from hvdlm.config import UserError

WAIT_S = 300.0
_POLL_S = 0.1
_MOST_BYTES = 1 << 20


def meet(launch: Launch, folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Serve the store (rank 0) or find it, and say what Horovod needs to know of it.

    The store lives as long as rank 0's process.

    Args:
        launch: this process among the tasks of its step.
        folder: one that all of them see; made where missing.
        env: the environment, for the step's name and this node's.

    Returns:
        Environment variables for Horovod.

    Raises:
        UserError: the folder cannot be written, or rank 0 is not heard of for five minutes.

    Collective: yes.
    """
    step = ".".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    path = folder / f".rendezvous-{step}"
    if launch.rank == 0:
        told = _serve(env)
        _write(path, told)
    else:
        told = _wait_for(path)
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        # Horovod appends ":PORT/SCOPE/KEY" to what it takes for an address.
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{told['address']}:{told['port']}/{told['secret']}",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(told["port"]),
        "HOROVOD_HOSTNAME": socket.gethostname(),
        "HOROVOD_RANK": str(launch.rank),
        "HOROVOD_SIZE": str(launch.size),
        "HOROVOD_LOCAL_RANK": str(launch.local_rank),
        "HOROVOD_LOCAL_SIZE": str(launch.local_size),
        **_across(launch, env),
    }


def forget(folder: Path) -> None:
    """Remove the files of steps that have met; for rank 0, once all are there."""
    for path in folder.glob(".rendezvous-*"):
        path.unlink(missing_ok=True)


def _across(launch: Launch, env: Mapping[str, str]) -> dict[str, str]:
    """The ranks of this local rank, one a node that has so many tasks: nodes may have different numbers."""
    nodes = [node for node, tasks in enumerate(tasks_of_nodes(env)) if tasks > launch.local_rank]
    own = nodes.index(int(env.get("SLURM_NODEID", "0")))
    return {"HOROVOD_CROSS_RANK": str(own), "HOROVOD_CROSS_SIZE": str(len(nodes))}


def _serve(env: Mapping[str, str]) -> dict[str, str | int]:
    alone = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    address = "127.0.0.1" if alone else socket.gethostbyname(env.get("SLURMD_NODENAME", socket.gethostname()))
    server = _Store((address, 0))
    threading.Thread(target=server.serve_forever, name="rendezvous", daemon=True).start()
    return {"address": address, "port": server.server_port, "secret": server.secret}


def _write(path: Path, told: Mapping[str, str | int]) -> None:
    temp = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(told))
        temp.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another folder") from error


def _wait_for(path: Path) -> dict[str, str | int]:
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        try:
            told: dict[str, str | int] = json.loads(path.read_text())
            return told
        except OSError:
            time.sleep(_POLL_S)
    raise UserError(
        f"{path}: rank 0 did not write it within {WAIT_S:.0f} s; is the folder shared by all nodes?"
    )


@final
class _Store(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.secret = secrets.token_hex(16)
        self.values: dict[str, bytes] = {}


@final
class _Handler(BaseHTTPRequestHandler):
    server: _Store
    timeout = 30

    def do_GET(self) -> None:
        key = self._key()
        value = self.server.values.get(key) if key else None
        self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        key, size = self._key(), int(self.headers.get("Content-Length", "0"))
        if key and size <= _MOST_BYTES:
            self.server.values[key] = self.rfile.read(size)
        self._answer(200 if key and size <= _MOST_BYTES else 400, b"")

    def do_DELETE(self) -> None:
        key = self._key()
        if key:
            self.server.values.pop(key, None)
        self._answer(200 if key else 400, b"")

    def log_message(self, *_: object) -> None:
        """Nothing: what is asked for is no news."""

    def _key(self) -> str:
        """SCOPE/KEY of the path /SECRET:PORT/SCOPE/KEY; empty where it is of another kind."""
        _, _, rest = self.path.partition("/")
        secret, _, key = rest.partition("/")
        expected = f"{self.server.secret}:{self.server.server_port}"
        return key if secrets.compare_digest(secret, expected) else ""

    def _answer(self, status: int, value: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)
