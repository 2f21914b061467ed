"""The ledger of a run read back strictly: its attempts, the rows that count, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.run.ledger import FILE_NAME


@dataclass(frozen=True)
class Row:
    """A line of the ledger, counted from 1: a step that consumed the samples [first_sample, end_sample)."""

    line: int
    step: int
    first_sample: int
    end_sample: int
    world_size: int


@dataclass
class Attempt:
    """A start of the run, with its rows in the file's order; those from step `redone_from` on are void,
    because a later attempt did them again (0 = none is). `micro_batch` is 0 where an older ledger does not
    say it."""

    number: int
    resumed_at: int
    micro_batch: int = 0
    rows: list[Row] = field(default_factory=list)
    redone_from: int = 0

    @property
    def kept(self) -> list[Row]:
        """Its rows that count."""
        return [row for row in self.rows if not self.redone_from or row.step < self.redone_from]


@dataclass(frozen=True)
class History:
    """What a ledger tells; `problems` are in the order of its lines."""

    attempts: list[Attempt]
    problems: list[str]
    torn_lines: list[int]

    @property
    def rows(self) -> list[Row]:
        """The rows that count, in the file's order."""
        return [row for attempt in self.attempts for row in attempt.kept]

    def micro_batch(self, step: int) -> int:
        """Samples of each slot of a step, in the attempt whose row of it counts; 0 = not known."""
        of = (attempt for attempt in self.attempts for row in attempt.kept if row.step == step)
        return next((attempt.micro_batch for attempt in of), 0)


def read_history(run_folder: Path) -> History:
    """Read a run's ledger.

    A line that cannot be read is no problem by itself where a crash leaves one: at the end of an attempt.

    Raises:
        FileNotFoundError: There is none.
    """
    attempts: list[Attempt] = []
    problems: list[str] = []
    torn: list[int] = []
    lines = (run_folder / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, 1):
        entry = _parse(text)
        if isinstance(entry, Attempt):
            if attempts and entry.number <= attempts[-1].number:
                problems.append(f"line {number} opens attempt {entry.number} after {attempts[-1].number}")
            attempts.append(entry)
        elif entry is None:
            torn.append(number)
        else:
            problems += _place(attempts, number, entry)
            if torn and torn[-1] == number - 1:
                problems.append(f"line {number - 1} cannot be read")
    _void(attempts)
    return History(attempts, problems, torn)


def problem_of_rows(history: History, *, steps: int, global_batch: int) -> str | None:
    """The first gap or overlap of the rows that count: steps 1 to `steps` are there once each, one after
    the other, and step s has the samples [(s - 1) G, s G); what follows goes on like that."""
    expected, before = 1, 0
    for row in history.rows:
        if row.step < expected:
            return f"line {row.line}: step {row.step} is there twice: overlap"
        if row.step > expected:
            return f"{_steps(expected, row.step - 1)} missing between lines {before} and {row.line}: gap"
        first, end = (row.step - 1) * global_batch, row.step * global_batch
        if (row.first_sample, row.end_sample) != (first, end):
            return (
                f"line {row.line}: step {row.step} has the samples [{row.first_sample}, {row.end_sample}), "
                f"needed [{first}, {end}): {'overlap' if row.first_sample < first else 'gap'}"
            )
        expected, before = row.step + 1, row.line
    if expected <= steps:
        torn = "".join(f"; line {line} is cut short" for line in history.torn_lines if line > before)
        return f"{_steps(expected, steps)} missing after line {before}, but a checkpoint has them: gap{torn}"
    return None


def _parse(text: str) -> Attempt | dict[str, int] | None:
    """What opens an attempt, a row, or None for neither."""
    try:
        entry: Any = json.loads(text)
        if "resumed_at" in entry:
            return Attempt(int(entry["attempt"]), int(entry["resumed_at"]), int(entry.get("micro_batch", 0)))
        names = ("step", "first_sample", "end_sample", "world_size", "attempt")
        return {name: int(entry[name]) for name in names}
    except (ValueError, KeyError, TypeError):
        return None


def _place(attempts: list[Attempt], line: int, entry: dict[str, int]) -> list[str]:
    """Give a row to its attempt; what is wrong with that."""
    number, problems = entry.pop("attempt"), []
    if not attempts or attempts[-1].number != number:
        problems.append(f"line {line}: a row of attempt {number}, but no line before it opens that attempt")
        attempts.append(Attempt(number, entry["step"]))
    attempts[-1].rows.append(Row(line, **entry))
    return problems


def _void(attempts: Sequence[Attempt]) -> None:
    for index, attempt in enumerate(attempts):
        attempt.redone_from = min((later.resumed_at for later in attempts[index + 1 :]), default=0)


def _steps(first: int, last: int) -> str:
    return f"step {first} is" if first == last else f"steps {first} to {last} are"
