"""The table of the chain: which job trains after which end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hvdlm.run import jobs
from hvdlm.run.retry import last_end, what_forbids

STEPS = 100
ENDED_UNIX = 1000.0


def record(folder: Path, state: str, **fields: Any) -> None:
    text = json.dumps({"state": state, "attempt": 1, "step": 40, "time_unix": ENDED_UNIX, **fields})
    (folder / "exit.json").write_text(text)


def row(folder: Path, event: str, *, unix: float, job: str = "7", **fields: Any) -> None:
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"job": job, "event": event, "time_unix": unix, **fields}) + "\n")


def answers(folder: Path) -> tuple[int | None, int | None]:
    """What ends a job that was queued before the end, and one handed in after it; None = it trains."""
    ends = [what_forbids(folder, steps=STEPS, submitted_unix=ENDED_UNIX + s) for s in (-100, 100)]
    before, after = (end.exit_code if end else None for end in ends)
    return before, after


@pytest.mark.parametrize(
    ("state", "fields", "expected"),
    [
        ("done", {"step": 100, "reason": "all steps"}, (0, 0)),
        ("done", {"step": 60, "reason": "plateau"}, (0, 0)),
        ("done", {"step": 60, "reason": "all steps"}, (None, None)),  # train.steps was raised
        ("stopped", {"reason": "signal SIGUSR2"}, (None, None)),
        ("stopped", {"reason": "the job's time is nearly over"}, (None, None)),
        ("stopped", {"reason": "file data/runs/x/STOP"}, (75, None)),
        ("running", {}, (None, None)),
        ("failed", {"exit_code": 1, "error": "boom"}, (None, None)),
        ("failed", {"exit_code": 2, "error": "a damaged shard"}, (2, None)),
        ("no_progress", {"exit_code": 93}, (93, None)),
    ],
)
def test_exit_json_decides(
    state: str, fields: dict[str, Any], expected: tuple[int | None, int | None], tmp_path: Path
) -> None:
    record(tmp_path, state, **fields)
    assert answers(tmp_path) == expected


def test_a_new_run_trains(tmp_path: Path) -> None:
    assert answers(tmp_path) == answers(tmp_path / "missing") == (None, None)


def test_a_job_that_ended_after_a_start_does_not_hide_how_that_ended(tmp_path: Path) -> None:
    record(tmp_path, "done", step=100, reason="all steps")
    row(tmp_path, jobs.ENDED, unix=ENDED_UNIX + 2, exit_code=0, began=True)
    assert answers(tmp_path) == (0, 0)


def test_a_refusal_counts_until_a_start_begins(tmp_path: Path) -> None:
    record(tmp_path, "stopped", reason="signal SIGTERM", time_unix=ENDED_UNIX - 50)
    row(tmp_path, jobs.BEGUN, unix=ENDED_UNIX - 10)
    row(tmp_path, jobs.REFUSED, unix=ENDED_UNIX - 1, exit_code=2, error="no manifest.json")
    row(tmp_path, jobs.ENDED, unix=ENDED_UNIX, exit_code=2, began=False)
    assert answers(tmp_path) == (2, None)
    assert last_end(tmp_path, steps=STEPS).why == "no manifest.json"
    record(tmp_path, "stopped", reason="signal SIGTERM", time_unix=ENDED_UNIX + 50)
    assert answers(tmp_path) == (None, None)


def test_a_full_disk_may_be_empty_the_next_time(tmp_path: Path) -> None:
    row(tmp_path, jobs.REFUSED, unix=ENDED_UNIX - 1, exit_code=1, error="disk full")
    row(tmp_path, jobs.ENDED, unix=ENDED_UNIX, exit_code=1, began=False)
    assert answers(tmp_path) == (None, None)


def test_three_jobs_without_a_start_are_enough(tmp_path: Path) -> None:
    for number in range(3):
        assert answers(tmp_path) == (None, None)
        row(tmp_path, jobs.ENDED, unix=ENDED_UNIX - 2 + number, job=str(number), exit_code=143, began=False)
    assert answers(tmp_path) == (93, None)


def test_jobs_that_found_another_at_work_are_not_counted(tmp_path: Path) -> None:
    """Nor is the crash of a job before them forgotten for their sake."""
    record(tmp_path, "failed", exit_code=2, error="a damaged shard", time_unix=ENDED_UNIX - 5)
    for number in range(3):
        fields = {"exit_code": 1, "began": False, "held_by": "1"}
        row(tmp_path, jobs.REFUSED, unix=ENDED_UNIX - 2 + number, job=str(number), exit_code=1, error="held")
        row(tmp_path, jobs.ENDED, unix=ENDED_UNIX - 2 + number, job=str(number), **fields)
    assert last_end(tmp_path, steps=STEPS).why == "a damaged shard"
    assert answers(tmp_path) == (2, None)


def test_jobs_that_left_out_a_bad_node_are_not_counted(tmp_path: Path) -> None:
    for number in range(3):
        row(tmp_path, jobs.ENDED, unix=ENDED_UNIX, job=str(number), exit_code=75, began=False)
    assert answers(tmp_path) == (None, None)


def test_a_wish_that_nobody_heard_yet_ends_what_was_queued(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    os.utime(tmp_path / "STOP", (ENDED_UNIX, ENDED_UNIX))
    record(tmp_path, "stopped", reason="signal SIGTERM", time_unix=ENDED_UNIX + 1)
    assert answers(tmp_path) == (75, None)


def test_runs_have_names_of_their_own(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "my run", tmp_path / "b" / "my run"
    assert jobs.job_name(one).startswith("hvdlm-my-run-")
    assert jobs.job_name(one) != jobs.job_name(other)
    assert jobs.job_name(one) == jobs.job_name(tmp_path / "a" / "." / "my run")
