"""Schedule, ledger, exit record."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hvdlm.config import OptimConfig
from hvdlm.data.loader import StepBatch
from hvdlm.run import exit_record, ledger, stop
from hvdlm.run.history import Row, problem_of_rows, read_history
from hvdlm.run.ledger import Ledger
from hvdlm.run.schedule import learning_rate
from hvdlm.run.stop import deadline

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    assert learning_rate(1, OPTIM, 110) == pytest.approx(0.1)
    assert learning_rate(10, OPTIM, 110) == pytest.approx(1.0)
    assert learning_rate(60, OPTIM, 110) == pytest.approx(0.55)
    assert learning_rate(110, OPTIM, 110) == pytest.approx(0.1)
    rates = [learning_rate(s, OPTIM, 110) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_a_constant_rate_stays() -> None:
    optim = replace(OPTIM, schedule="constant", warmup_steps=0)
    assert {learning_rate(s, optim, 50) for s in (1, 25, 50)} == {1.0}


def batch(step: int) -> StepBatch:
    return StepBatch(step, 8 * (step - 1), 8 * step, 256, [])


def test_a_resumed_attempt_voids_what_it_does_again(tmp_path: Path) -> None:
    first = Ledger(tmp_path, attempt=1, resumed_at=1, micro_batch=2)
    for step in (1, 2, 3):
        first.add(ledger.row_of(batch(step), world_size=4, attempt=1))
    first.close()
    second = Ledger(tmp_path, attempt=2, resumed_at=3, micro_batch=2)
    second.add(ledger.row_of(batch(3), world_size=2, attempt=2))
    second.close()
    history = read_history(tmp_path)
    assert history.rows == [Row(2, 1, 0, 8, 4), Row(3, 2, 8, 16, 4), Row(6, 3, 16, 24, 2)]
    assert [(a.number, a.resumed_at, len(a.rows)) for a in history.attempts] == [(1, 1, 3), (2, 3, 1)]
    assert problem_of_rows(history, steps=3, global_batch=8) is None
    assert ledger.attempts(tmp_path) == 2


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / ledger.FILE_NAME
    path.write_text(json.dumps({"attempt": 1, "resumed_at": 1}) + '\n{"step": 1, "fir')
    Ledger(tmp_path, attempt=2, resumed_at=1, micro_batch=2).close()
    assert [r["attempt"] for r in ledger.read_rows(path)] == [1, 2]


def test_rows_that_rank_0_did_not_live_to_write_are_added(tmp_path: Path) -> None:
    first = Ledger(tmp_path, attempt=1, resumed_at=1, micro_batch=2)
    rows = [ledger.row_of(batch(step), world_size=2, attempt=1) for step in (1, 2, 3)]
    first.add(rows[0])
    first.close()
    with (tmp_path / ledger.FILE_NAME).open("a") as file:
        file.write('{"step": 2, "fir')
    ledger.add_missing(tmp_path, rows)
    ledger.add_missing(tmp_path, rows)
    Ledger(tmp_path, attempt=2, resumed_at=4, micro_batch=2).close()
    history = read_history(tmp_path)
    assert [row.step for row in history.rows] == [1, 2, 3]
    assert problem_of_rows(history, steps=3, global_batch=8) is None


def test_the_first_failure_is_the_one_that_counts(tmp_path: Path) -> None:
    exit_record.write(tmp_path, "running", attempt=3, step=0)
    assert exit_record.write_failure(tmp_path, attempt=3, rank=1, exit_code=1, error="the cause")
    assert not exit_record.write_failure(tmp_path, attempt=3, rank=0, exit_code=1, error="the echo")
    record = exit_record.read(tmp_path)
    assert (record["state"], record["rank"], record["error"]) == ("failed", 1, "the cause")
    assert len(exit_record.failures(tmp_path, 3)) == 2
    assert exit_record.failures(tmp_path, 2) == []


def test_of_many_that_fail_at_once_one_is_the_first(tmp_path: Path) -> None:
    for attempt in range(20):
        ready = threading.Barrier(8)

        def fail(rank: int, attempt: int = attempt, ready: threading.Barrier = ready) -> bool:
            ready.wait()
            return exit_record.write_failure(
                tmp_path, attempt=attempt, rank=rank, exit_code=1, error=f"{rank}"
            )

        with ThreadPoolExecutor(8) as pool:
            firsts = list(pool.map(fail, range(8)))
        assert sum(firsts) == 1
        assert exit_record.read(tmp_path)["rank"] == firsts.index(True)


def test_a_stop_file_that_cannot_be_looked_at_is_none(tmp_path: Path) -> None:
    """Such as on a file server that hiccups; here a name that no file can have."""
    with pytest.raises(OSError, match="too long"):
        (tmp_path / ("x" * 300)).exists()
    assert not stop._exists(tmp_path / ("x" * 300))
    (tmp_path / "STOP").touch()
    assert stop._exists(tmp_path / "STOP")


def test_the_deadline_is_the_jobs_end_less_the_margin() -> None:
    assert deadline(1000.0, 120) == 880
    assert deadline(0.0, 120) == 0
