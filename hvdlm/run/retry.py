"""Whether another job of a run should train: the table of the chain.

A job that is queued behind others was asked for before they ended. What needs a person (a wish to stop, a
refused configuration, no progress) ends those too; a job handed in later is that person's answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_REQUEUE, EXIT_USAGE
from hvdlm.run import exit_record, jobs, stop

_TABLE = {
    # how the last start ended   queued before: trains?   handed in after: trains?   else ends with
    "nothing": (True, True, EXIT_DONE),
    "unfinished": (True, True, EXIT_REQUEUE),
    "crashed": (True, True, EXIT_CRASH),
    "done": (False, False, EXIT_DONE),
    "stopped by a wish": (False, True, EXIT_REQUEUE),
    "refused": (False, True, EXIT_USAGE),
    "no progress": (False, True, EXIT_NO_PROGRESS),
}

_FRUITLESS = 3


@dataclass(frozen=True)
class End:
    """How a run's last start, or last job, ended.

    Attributes:
        kind: a key of the table.
        unix: when, in seconds since 1970; 0 = never.
        why: for people.
    """

    kind: str
    unix: float = 0.0
    why: str = ""

    @property
    def exit_code(self) -> int:
        """What a job ends with that does not train because of it."""
        return _TABLE[self.kind][2]

    def lets_train(self, submitted_unix: float) -> bool:
        """Whether a job that was handed in then should train."""
        before, after, _ = _TABLE[self.kind]
        return before if submitted_unix <= self.unix else after


def what_forbids(run_folder: Path, *, steps: int, submitted_unix: float) -> End | None:
    """The end for which a job that was handed in then should not train; None where it should.

    Args:
        run_folder: may be missing.
        steps: that the run is to do in all.
        submitted_unix: when the job was handed in, by Slurm's clock.
    """
    ends = [_standing_wish(run_folder), last_end(run_folder, steps=steps)]
    return next((end for end in ends if not end.lets_train(submitted_unix)), None)


def last_end(run_folder: Path, *, steps: int) -> End:
    """How the run ended last, by exit.json and, where jobs ended later without a start, by jobs.jsonl."""
    of_record = _of_record(exit_record.read(run_folder), steps)
    of_jobs = _of_jobs(jobs.rows(run_folder))
    return of_jobs if of_jobs.unix > of_record.unix else of_record


def _standing_wish(run_folder: Path) -> End:
    """A file STOP that nobody has heard yet."""
    try:
        unix = (run_folder / stop.STOP_FILE).stat().st_mtime
    except OSError:
        return End("nothing")
    return End("stopped by a wish", unix, f"{run_folder / stop.STOP_FILE} is there")


def _of_record(record: dict[str, Any], steps: int) -> End:
    state, reason, error = record.get("state"), str(record.get("reason", "")), str(record.get("error", ""))
    unix, step = float(record.get("time_unix", 0.0)), int(record.get("step") or 0)
    if state is None:
        return End("nothing")
    if state == "done":
        finished = step >= steps or reason == exit_record.PLATEAU
        return End("done" if finished else "unfinished", unix, f"finished after step {step}")
    if state == "stopped":
        kind = "stopped by a wish" if stop.is_wish(reason) else "unfinished"
        return End(kind, unix, f"stopped after step {step} ({reason})")
    if state == "no_progress":
        return End("no progress", unix, f"three starts in a row left no checkpoint after step {step}")
    if record.get("exit_code") == EXIT_USAGE:
        return End("refused", unix, error)
    return End("crashed", unix, error or "the last start ended without a word")


def _of_jobs(rows: list[dict[str, Any]]) -> End:
    """What ended before a start began: train refused, or the ranks could not be started."""
    # A job that found another at work says nothing of how the run ends.
    held = {row["job"] for row in rows if row.get("held_by")}
    ends = [r for r in rows if r["event"] in (jobs.REFUSED, jobs.ENDED) and r["job"] not in held]
    if not ends:
        return End("nothing")
    last, unix = ends[-1], float(ends[-1]["time_unix"])
    refusal = next(
        (row for row in ends[-2:] if row["event"] == jobs.REFUSED and row["job"] == last["job"]), {}
    )
    if not last.get("began") and last["exit_code"] == EXIT_USAGE:
        return End("refused", unix, str(refusal.get("error", "train would not begin; see the log")))
    latest = [row for row in ends if row["event"] == jobs.ENDED][-_FRUITLESS:]
    # 75 without a start: a bad node was left out, and the next job has another.
    fruitless = [row for row in latest if not row["began"] and row["exit_code"] != EXIT_REQUEUE]
    if len(fruitless) == _FRUITLESS:
        return End("no progress", unix, f"the last {_FRUITLESS} jobs ended before training began")
    # Where a start began, exit.json knows how it ended.
    return End("nothing") if last.get("began") else End("crashed", unix, "the ranks did not start")
