"""The store and the messages of an elastic run, and what strangers can do to it: nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdlm.cluster.elastic.driver import FILE_NAME, Driver
from hvdlm.cluster.elastic.members import Policy
from hvdlm.comm.member import Member, read_told, tell
from hvdlm.comm.store import Store


@pytest.fixture
def store() -> Iterator[Store]:
    heard: list[Any] = []

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        heard.append(message)
        return {"heard": len(heard)}

    store = Store("127.0.0.1", answer)
    store.heard = heard  # type: ignore[attr-defined]
    yield store
    store.close()


def send(store: Store, data: bytes) -> bytes:
    """Raw bytes to the port; all that comes back before it is closed."""
    with socket.create_connection(("127.0.0.1", store.server_port), timeout=15) as connection:
        received = b""
        # It may hang up before it has read all.
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            connection.sendall(data)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(4096):
                received += chunk
        return received


def hostile(key: str) -> list[bytes]:
    """What a scanner, a fuzzer and somebody who knows Horovod's server would try."""
    body = b"cos\nsystem\n(S'touch /tmp/owned'\ntR."
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    return [
        b"",
        b"\x00" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /global/0 HTTP/1.1\r\n\r\n",
        b"GET /" + b"0" * 32 + b"/tell HTTP/1.1\r\n\r\n",
        b"GET /" + key[:-1].encode() + b"/tell HTTP/1.1\r\n\r\n",
        b"GET /" + b"A" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"PUT /worker_addresses/0 HTTP/1.1\r\n" + length + body,
        b"PUT /rank_and_size/n1:0 HTTP/1.1\r\n" + length + body,
        b"POST /tell HTTP/1.1\r\n" + length + body,
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"BREW /pot HTTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    ]


def test_who_does_not_know_the_key_gets_no_byte(store: Store) -> None:
    store.put("0:1/global/0", b"kept")
    for data in hostile(store.secret):
        assert send(store, data) == b"", data[:60]
    assert store.values == {"0:1/global/0": b"kept"}
    assert store.heard == []  # type: ignore[attr-defined]


def test_with_the_key_but_wrong_nothing_breaks(store: Store) -> None:
    key = store.secret.encode()
    too_long = b"PUT /" + key + b"/x HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2000000
    assert send(store, too_long) == b""
    assert send(store, b"PUT /" + key + b"/x HTTP/1.1\r\nContent-Length: -1\r\n\r\n") == b""
    assert send(store, b"PUT /" + key + b"/x HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc") == b""
    assert send(store, b"POST /" + key + b"/tell HTTP/1.1\r\nContent-Length: 4\r\n\r\nnope") == b""
    assert send(store, b"POST /" + key + b"/tell HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]") == b""
    assert store.values == {}
    assert tell(store.place, {"a": 1}) == {"heard": 1}


def test_open_connections_without_a_word_do_not_keep_others_out(store: Store) -> None:
    idle = [socket.create_connection(("127.0.0.1", store.server_port)) for _ in range(100)]
    try:
        assert tell(store.place, {}) == {"heard": 1}
    finally:
        for connection in idle:
            connection.close()


def test_an_address_that_is_no_peer_is_hung_up_on() -> None:
    store = Store("127.0.0.1", lambda _: {}, is_peer=lambda address: address == "127.0.0.2")
    try:
        with pytest.raises((OSError, http.client.HTTPException)):
            tell(store.place, {})
    finally:
        store.close()


def test_only_the_address_that_was_given_is_bound(store: Store) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.server_port), timeout=5)


def test_values_of_worlds_that_are_over_are_dropped(store: Store) -> None:
    store.put("1:80/global/0", b"a")
    store.put("10:80/global/0", b"b")
    store.forget("1:")
    assert store.values == {"10:80/global/0": b"b"}


def test_a_member_hears_of_its_place(tmp_path: Path) -> None:
    """A driver, a host and a worker in one process, over real connections."""
    policy = Policy(start_wait_s=0, settle_s=0)
    driver = Driver(tmp_path, "127.0.0.1", ["-m", "x"], policy=policy, job="", token="t")
    told = read_told(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o77 == 0
    host = {"from": "agent", "agent": "a-0", "host": "a", "slots": 1, "job": "", "leaving": "", "exited": {}}
    (name,) = tell(told["place"], host)["run"]
    member = Member(told, name)
    place = member.next_place(-1, lost=False)
    assert place
    assert (place["rank"], place["size"], place["step"], place["generation"]) == (0, 1, -1, 1)
    here, settings = member.settings(place)
    assert (here.rank, here.size) == (0, 1)
    assert settings["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == f"{told['place']}/1"
    driver.stop("enough")
    deadline = time.monotonic() + 10
    while member.stop != "enough" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert member.stop == "enough"
    code: list[int] = []
    ends = threading.Thread(target=lambda: code.append(driver.run(say=lambda _: None, tend=lambda: None)))
    ends.start()
    tell(told["place"], host | {"exited": {name: 75}})
    ends.join(10)
    assert code == [75]
    driver.close()
    assert not (tmp_path / FILE_NAME).exists()
    assert json.loads(json.dumps(told)) == told
