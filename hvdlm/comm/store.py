"""A small server for the processes of one job: a key-value store for Gloo, and messages in JSON.

Horovod's Gloo controller asks for nothing but GET, PUT and DELETE of small values by HTTP. Horovod's own
server binds every interface, takes PUT from anybody and unpickles what it got (CVE-2024-10190); this one
binds one address, hangs up without a word on whoever does not know a random key, and keeps bytes.

Source: Horovod 0.28.1, common/gloo/http_store.cc and runner/http/http_server.py (paths and statuses).
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias, final

Answer: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""What a message gets for an answer; called by one thread at a time."""

_MOST_BYTES = 1 << 20
_MOST_VALUES_BYTES = 1 << 28
_MOST_CONNECTIONS = 512


@final
class Store(ThreadingHTTPServer):
    """Serves from its construction to `close`, in threads.

    Args:
        address: of this host; only this one is bound, at a port that is free.
        answer: what POST gets; None = there are no messages.
        is_peer: whether an address may speak at all; None = all who know the key.

    Attributes:
        secret: the key, 128 random bits in hexadecimal: the first part of every path.
        place: "IP:PORT/KEY", for processes that may speak to it.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, address: str, answer: Answer | None = None, *, is_peer: Callable[[str], bool] | None = None
    ) -> None:
        super().__init__((address, 0), _Handler)
        self.secret = secrets.token_hex(16)
        self.values: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.place = f"{address}:{self.server_port}/{self.secret}"
        self._answer = answer
        self._is_peer = is_peer
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._thread = threading.Thread(target=self.serve_forever, name="store", daemon=True)
        self._thread.start()

    def hear(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a message; None where there are none."""
        with self.lock:
            return self._answer(message) if self._answer else None

    def put(self, key: str, value: bytes) -> bool:
        """Keep a value; whether there was room for it."""
        with self.lock:
            room = sum(map(len, self.values.values())) + len(value) <= _MOST_VALUES_BYTES
            if room:
                self.values[key] = value
        return room

    def forget(self, prefix: str) -> None:
        """Drop the values of all keys that begin so."""
        with self.lock:
            self.values = {k: v for k, v in self.values.items() if not k.startswith(prefix)}

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._is_peer is None or self._is_peer(client_address[0])

    def process_request(self, request: Any, client_address: Any) -> None:
        # Who opens connections without end gets them closed, and the job goes on.
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a peer that went away, or garbage, is no news."""


@final
class _Handler(BaseHTTPRequestHandler):
    server: Store
    timeout = 10

    def do_GET(self) -> None:
        key = self._key()
        if key:
            value = self.server.values.get(key)
            self._reply(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        key = self._key()
        content = self._content() if key else None
        if key and content is not None:
            self._reply(200 if self.server.put(key, content) else 507, b"")

    def do_DELETE(self) -> None:
        key = self._key()
        if key:
            self.server.values.pop(key, None)
            self._reply(200, b"")

    def do_POST(self) -> None:
        content = self._content() if self._key() == "tell" else None
        if content is not None:
            message = json.loads(content)
            answer = self.server.hear(message) if isinstance(message, dict) else None
            if answer is not None:
                self._reply(200, json.dumps(answer).encode())

    def send_error(self, *_: Any, **__: Any) -> None:
        """Not a word to who speaks no HTTP."""
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing: what is asked for is no news."""

    def _key(self) -> str:
        """What follows the secret in the path; empty where that is another one."""
        secret, _, key = self.path.removeprefix("/").partition("/")
        right = secrets.compare_digest(secret.encode(), self.server.secret.encode())
        self.close_connection = True
        return key if right else ""

    def _content(self) -> bytes | None:
        """The body; None where it is too long or cut short."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > _MOST_BYTES:
            return None
        content = self.rfile.read(int(size))
        return content if len(content) == int(size) else None

    def _reply(self, status: int, value: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)


def own_address(name: str) -> str:
    """The address under which the other nodes know this one.

    Args:
        name: of this node, as Slurm or its peers call it.
    """
    return socket.gethostbyname(name)
