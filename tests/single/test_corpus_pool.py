import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hvdlm.config import UserError
from hvdlm.corpus import signs
from hvdlm.corpus import work as works
from hvdlm.corpus.crew import Crew, alone
from hvdlm.corpus.encode import encode_task
from hvdlm.corpus.job import TOKENIZER_NAME, Job, Tally
from hvdlm.corpus.plan import Piece, Task
from hvdlm.corpus.pool import Team, _blocked
from hvdlm.corpus.work import GoneError, PeerError, StoppedError, Work
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import from_library


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "work").mkdir()
    tokenizer = from_library(TOKENIZERS["byte"]([], 0))
    (tmp_path / "work" / TOKENIZER_NAME).write_bytes(tokenizer.json_bytes)
    return Job(tmp_path / "work", val_fraction=0.5, shard_tokens=1000)


def plan(job: Job, *kinds: str) -> int:
    """A plan of tasks that all read one small file; returns their number."""
    path = job.folder.parent / "a.txt"
    path.write_text("some text")
    tasks = [Task(i, "train", (Piece(str(path), kind, 0, 9, 9),)) for i, kind in enumerate(kinds)]
    job.write_plan(tasks)
    assert [job.task(i) for i in range(len(kinds))] == tasks
    return len(tasks)


def at_work(job: Job, crew: Crew | None = None, *, stop: bool = False) -> Work:
    return Work(job.folder, crew or alone(), lambda: stop)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_counted(workers: int, job: Job) -> None:
    count, heard, work = plan(job, *["text"] * 5), list[Tally](), at_work(job)
    with Team(work, job, workers=workers, report=heard.append) as team:
        team.run("encode", encode_task, count)
        assert work.done("encode") == [0, 1, 2, 3, 4]
        assert [sum(column) for column in zip(*heard, strict=True)] == [45, 5, 50, 0, 5]
        team.run("encode", encode_task, count)
    assert sum(tally.documents for tally in heard) == 5
    results = [work.result("encode", i) for i in range(count)]
    assert [result["splits"]["train"]["documents"] for result in results] == [1] * 5
    assert [entry["tokens"] for result in results for entry in result["train"]] == [10] * 5
    assert not [*job.folder.glob(".tmp-*")]


def test_a_user_error_of_a_worker_arrives_whole(job: Job) -> None:
    count = plan(job, "text", "jsonl")
    team = Team(at_work(job), job, workers=2, report=print)
    with team, pytest.raises(UserError, match=r"a\.txt: line 1: not JSON") as caught:
        team.run("encode", encode_task, count)
    assert caught.value.exit_code == 2


def test_a_fault_of_a_worker_brings_its_traceback(job: Job) -> None:
    count = plan(job, "text", "no such kind")
    team = Team(at_work(job), job, workers=2, report=print)
    with team, pytest.raises(RuntimeError, match=r"(?s)a worker failed.*KeyError: 'no such kind'"):
        team.run("encode", encode_task, count)


def test_two_processes_share_the_tasks(job: Job) -> None:
    count = plan(job, *["text"] * 8)
    members = [at_work(job, Crew("both", rank, 2)) for rank in range(2)]
    taken = [member.claim("encode", count) for _ in range(4) for member in members]
    assert sorted(taken) == [0, 1, 2, 3, 4, 5, 6, 7]  # type: ignore[type-var]
    assert members[0].claim("encode", count) is None
    assert not members[1].complete("encode", count)


def test_another_start_takes_what_is_left(job: Job) -> None:
    first = at_work(job)
    assert first.claim("encode", 2) in (0, 1)
    first.finish("encode", 1, {"a": 1})
    second = at_work(job)
    (job.folder / ".tmp-half").touch()
    second.remove_leftovers()
    assert not (job.folder / ".tmp-half").exists()
    assert second.claim("encode", 2) == 0
    assert second.claim("encode", 2) is None
    assert second.result("encode", 1) == {"a": 1}


def test_claims_of_a_dead_member_are_free_after_a_lease(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = (at_work(job, Crew("both", rank, 2)) for rank in (0, 1))
    assert dead.claim("encode", 1) == 0
    assert alive.claim("encode", 1) is None
    monkeypatch.setattr(works, "LEASE_S", 0.05)
    time.sleep(0.1)
    alive.signs.give()
    assert alive.claim("encode", 1) == 0


def test_a_member_in_a_long_library_call_keeps_its_claims(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_EVERY_S", 0.05)
    monkeypatch.setattr(works, "LEASE_S", 0.5)
    busy, other = (at_work(job, Crew("both", rank, 2)) for rank in (0, 1))
    assert busy.claim("encode", 1) == 0
    with busy.signs:
        time.sleep(0.8)
        other.signs.give()
        assert other.claim("encode", 1) is None
    time.sleep(0.7)
    other.signs.give()
    assert other.claim("encode", 1) == 0


def test_a_failure_is_told_where_files_cannot_be_linked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    at_work(job, Crew("both", 0, 2)).fail(UserError("no space"))
    with pytest.raises(PeerError, match="process 0 failed: no space"):
        at_work(job, Crew("both", 1, 2)).check()


def test_a_member_that_was_started_again_takes_its_claims_back(job: Job) -> None:
    assert at_work(job, Crew("array-7", 3, 9, apart=True)).claim("encode", 1) == 0
    assert at_work(job, Crew("array-7", 4, 9, apart=True)).claim("encode", 1) is None
    assert at_work(job, Crew("array-7", 3, 9, apart=True)).claim("encode", 1) == 0


def test_a_failure_and_a_stop_reach_everybody_and_the_first_failure_is_named(job: Job) -> None:
    members = [at_work(job, Crew("both", rank, 3)) for rank in range(3)]
    members[0].fail(UserError("the first", 1))
    members[1].fail(UserError("its echo", 2))
    with pytest.raises(PeerError, match="process 0 failed: the first") as caught:
        members[2].check()
    assert caught.value.exit_code == 1
    with pytest.raises(StoppedError):
        at_work(job, Crew("other", 0, 2), stop=True).check()
    with pytest.raises(StoppedError):
        at_work(job, Crew("other", 1, 2)).check()
    at_work(job).check()


def test_a_folder_that_a_late_process_made_is_another(job: Job) -> None:
    work = at_work(job, Crew("array-1", 0, 2, apart=True))
    assert not work.complete("encode", 1)
    work.finish("encode", 0, {"a": 1})
    at_work(job, Crew("array-1", 1, 2, apart=True)).remove()
    late = at_work(job, Crew("array-1", 1, 2, apart=True))
    assert not late.complete("encode", 1)
    late.finish("encode", 0, {"a": 2})
    assert work.is_gone()
    for act in (
        lambda: work.claim("encode", 5),
        lambda: work.complete("encode", 1),
        lambda: work.result("encode", 0),
        lambda: work.finish("encode", 1, {}),
    ):
        with pytest.raises(GoneError):
            act()


def test_whoever_waits_when_the_folder_goes_knows_that_it_is_over(job: Job) -> None:
    count, work = plan(job, "text"), at_work(job, Crew("both", 0, 2))
    other = at_work(job, Crew("both", 1, 2))
    assert other.claim("encode", count) == 0
    timer = threading.Timer(0.3, other.remove)
    timer.start()
    with Team(work, job, workers=1, report=print) as team, pytest.raises(GoneError):
        team.run("encode", encode_task, count)
    timer.join()
    assert not job.folder.exists()


def test_an_interrupt_waits_until_a_worker_is_started_whichever_thread_was_given_it() -> None:
    end, started = threading.Event(), False
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), _blocked():
            signal.pthread_kill(other.ident or 0, signal.SIGINT)
            time.sleep(0.2)
            started = True
    finally:
        end.set()
        other.join()
    assert started
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
