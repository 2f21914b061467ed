"""The store by which the ranks of a plain srun find each other; tests/cluster starts real ones."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hvdlm.comm import rendezvous
from hvdlm.comm.launch import Launch
from hvdlm.config import UserError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2,1"}


def ask(url: str, method: str, content: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, content, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def test_the_store_answers_to_whoever_knows_its_key(tmp_path: Path) -> None:
    told = rendezvous.meet(Launch("gloo", 0, 3, 0, 2), tmp_path / "run", STEP)
    host, _, secret = told["HOROVOD_GLOO_RENDEZVOUS_ADDR"].partition("/")
    assert host == f"127.0.0.1:{told['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    # As Horovod puts it together.
    url = f"http://{host}/{secret}:{told['HOROVOD_GLOO_RENDEZVOUS_PORT']}/global/rank_0"
    assert ask(url, "GET") == (404, b"")
    assert ask(url, "PUT", b"\x00\xffvalue")[0] == 200
    assert ask(url, "GET") == (200, b"\x00\xffvalue")
    key = secret.partition("/")[0]
    for method, content in (("GET", None), ("PUT", b"x"), ("DELETE", None), ("POST", b"{}")):
        with pytest.raises(OSError, match=r"closed connection|reset"):
            ask(url.replace(key, "0" * 32), method, content)
    assert ask(url, "GET") == (200, b"\x00\xffvalue")
    assert ask(url, "DELETE")[0] == 200
    assert ask(url, "GET")[0] == 404


def test_the_others_read_a_file_that_is_the_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rendezvous.meet(Launch("gloo", 0, 3, 0, 2), tmp_path, STEP)
    [path] = tmp_path.glob(".rendezvous-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    last = rendezvous.meet(Launch("gloo", 2, 3, 0, 1), tmp_path, {**STEP, "SLURM_NODEID": "1"})
    same = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
    assert last[same] == first[same]
    assert [last[f"HOROVOD_{name}"] for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE")] == ["2", "0", "1"]
    # Of two local ranks 0, on nodes of two tasks and one; local rank 1 is alone.
    assert (last["HOROVOD_CROSS_RANK"], last["HOROVOD_CROSS_SIZE"]) == ("1", "2")
    second = rendezvous.meet(Launch("gloo", 1, 3, 1, 2), tmp_path, STEP)
    assert (second["HOROVOD_CROSS_RANK"], second["HOROVOD_CROSS_SIZE"]) == ("0", "1")
    rendezvous.forget(tmp_path)
    monkeypatch.setattr(rendezvous, "WAIT_S", 0.2)
    with pytest.raises(UserError, match="rank 0 did not write it within 0 s"):
        rendezvous.meet(Launch("gloo", 1, 3, 1, 2), tmp_path, STEP)
