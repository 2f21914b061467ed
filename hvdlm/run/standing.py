"""How far a run is, how fast, and how much of its time counted: by its files, without torch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_DONE, EXIT_NO_PROGRESS, EXIT_REQUEUE, EXIT_USAGE
from hvdlm.run import jobs, ledger
from hvdlm.run.history import read_history

METRICS_FILE = "metrics.jsonl"

ORDERLY = (EXIT_DONE, EXIT_USAGE, EXIT_REQUEUE, EXIT_NO_PROGRESS)
"""Exit codes that are no failure of a machine or of the program."""

_RECENT_STEPS = 100
_RECENT_SAVES = 10


@dataclass(frozen=True)
class SaveCost:
    """What a checkpoint costs, the median of the last few.

    Attributes:
        stall_s: seconds for which the run stands still.
        write_s: seconds from its beginning until it is committed.
    """

    stall_s: float
    write_s: float


@dataclass(frozen=True)
class Standing:
    """What a run's files tell.

    Attributes:
        attempts: starts so far.
        step: the last one done; 0 = none.
        loss: of that step; None where it was not finite, or there is none.
        tokens_per_s: of the last steps, the median.
        step_s: seconds a step, likewise.
        steps_done: over all starts, those done again included.
        steps_kept: of them those that count.
        training_s: seconds that went into steps.
        save: what a checkpoint costs; None before the first.
    """

    attempts: int = 0
    step: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    steps_done: int = 0
    steps_kept: int = 0
    training_s: float = 0.0
    save: SaveCost | None = None


def read_standing(run_folder: Path) -> Standing:
    """Read ledger and metrics of a run; of one that has not begun all is 0."""
    path = run_folder / METRICS_FILE
    rows = ledger.read_rows(path) if path.exists() else []
    trained = [row for row in rows if row.get("kind") == "train"]
    attempts, kept, done = 0, 0, 0
    if (run_folder / ledger.FILE_NAME).exists():
        history = read_history(run_folder)
        attempts, kept = len(history.attempts), len(history.rows)
        done = sum(len(attempt.rows) for attempt in history.attempts)
    recent = deque(trained, maxlen=_RECENT_STEPS)
    return Standing(
        attempts=attempts,
        step=trained[-1]["step"] if trained else 0,
        loss=trained[-1]["loss"] if trained else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in recent) if recent else 0.0,
        step_s=statistics.median(map(_seconds, recent)) if recent else 0.0,
        steps_done=done,
        steps_kept=kept,
        training_s=sum(map(_seconds, trained)),
        save=save_cost(rows),
    )


def save_cost(rows: list[dict[str, Any]]) -> SaveCost | None:
    """What the last checkpoints cost, by their rows in metrics.jsonl."""
    saves = [row for row in rows if row.get("kind") == "save"][-_RECENT_SAVES:]
    if not saves:
        return None
    costs = [cost_of(row) for row in saves]
    stall_s, write_s = (statistics.median(values) for values in zip(*map(astuple, costs), strict=True))
    return SaveCost(stall_s, write_s)


def cost_of(seconds: Mapping[str, float]) -> SaveCost:
    """What one checkpoint cost, by `Saved.seconds` or its row in metrics.jsonl."""
    around_s = seconds["snapshot_s"] + seconds["commit_s"]
    return SaveCost(around_s + seconds["stall_s"], around_s + seconds["write_s"])


def best_interval_s(cost: SaveCost, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least, to saving and to doing steps again.

    One save is in flight at a time, so no less than a save takes.

    Source: Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; Daly, A
    higher order estimate of the optimum checkpoint interval, FGCS 22(3), 2006: its first order.
    """
    return max(math.sqrt(2 * cost.stall_s * mtbf_s), cost.write_s)


@dataclass(frozen=True)
class JobTimes:
    """How long a run's jobs have had it.

    Attributes:
        wall_s: from their begin to their end, or to now, together.
        failures: jobs that ended as a crash, or without a word.
    """

    wall_s: float
    failures: int


def job_times(rows: list[dict[str, Any]], *, running: set[str], now_unix: float) -> JobTimes:
    """Add up the rows of jobs.jsonl.

    Args:
        rows: of `jobs.rows`.
        running: numbers of the jobs that run now.
        now_unix: the time.
    """
    wall_s, failures, job, since, ends_unix = 0.0, 0, "", 0.0, math.inf
    for row in rows:
        unix = float(row["time_unix"])
        if row["event"] == jobs.BEGUN:
            if job:
                # Killed: it had the run until about now, as its successor was waiting, or to its limit.
                wall_s, failures = wall_s + min(unix, ends_unix) - since, failures + 1
            job, since, ends_unix = row["job"], unix, row.get("ends_unix") or math.inf
        elif row["event"] == jobs.ENDED and row["job"] == job:
            wall_s, failures = wall_s + unix - since, failures + (row["exit_code"] not in ORDERLY)
            job = ""
    if job in running:
        wall_s += now_unix - since
    elif job:
        failures += 1
    return JobTimes(wall_s, failures)


def _seconds(row: dict[str, Any]) -> float:
    """What a step took."""
    return float(row["tokens"] / row["step"] / row["tokens_per_s"]) if row["tokens_per_s"] else 0.0
