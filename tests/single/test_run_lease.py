"""Two starts on one run folder: the second waits, and takes over only from the dead."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hvdlm.config import UserError
from hvdlm.run import lease
from hvdlm.run.lease import FILE_NAME, Lease

ELSEWHERE = {"token": "theirs", "host": "elsewhere", "pid": 7, "started_unix": 1.0, "job": "42", "beats": "0"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_WAIT_S", 1.5)
    monkeypatch.setattr(lease, "_SILENT_S", 0.8)


def hold_and_die(folder: str) -> None:
    Lease(Path(folder))
    os._exit(9)


def hold_at_once(folder: str, barrier: Any, outcomes: Any, end: Any) -> None:
    lease._WAIT_S, lease._SILENT_S = 1.5, 0.8
    barrier.wait()
    try:
        Lease(Path(folder))
    except UserError:
        outcomes.put("refused")
    else:
        outcomes.put("held")
        end.wait()


def test_a_second_start_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .*touch .*STOP") as caught:
        Lease(tmp_path)
    assert caught.value.exit_code == 1
    first.check()
    first.release()
    Lease(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_start_that_died_here_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SILENT_S", 1e9)
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert (tmp_path / FILE_NAME).exists()
    Lease(tmp_path).release()


def test_silence_is_the_death_of_another_host(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(ELSEWHERE))
    Lease(tmp_path).release()


def test_a_heartbeat_from_another_host_is_respected(tmp_path: Path) -> None:
    done = threading.Event()

    def beat() -> None:
        for beats in range(1000):
            (tmp_path / "new").write_text(json.dumps(ELSEWHERE | {"beats": str(beats)}))
            (tmp_path / "new").rename(tmp_path / FILE_NAME)
            if done.wait(0.2):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(UserError, match="job 42, process 7 on elsewhere"):
        Lease(tmp_path)
    done.set()
    thread.join()


def test_its_own_heartbeat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 0.05)
    held = Lease(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    time.sleep(0.3)
    after = (tmp_path / FILE_NAME).read_bytes()
    held.release()
    assert json.loads(before)["beats"] < json.loads(after)["beats"]
    assert len(before) == len(after)


def test_who_lost_the_folder_commits_nothing(tmp_path: Path) -> None:
    suspended = Lease(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps(ELSEWHERE))
    with pytest.raises(UserError, match=r"job 42, process 7 on elsewhere.*took this run over"):
        suspended.check()
    suspended.release()
    assert (tmp_path / FILE_NAME).exists()


def test_an_unreadable_file_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    Lease(tmp_path).release()


def test_of_starts_at_one_moment_one_wins(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(ELSEWHERE))
    context = multiprocessing.get_context("spawn")
    barrier, outcomes, end = context.Barrier(3), context.Queue(), context.Event()
    arguments = (str(tmp_path), barrier, outcomes, end)
    processes = [context.Process(target=hold_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(outcomes.get(timeout=60) for _ in processes)
    end.set()
    for process in processes:
        process.join()
    assert found == ["held", "refused", "refused"]
