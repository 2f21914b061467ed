"""ledger.jsonl: which samples each optimizer step consumed, over every attempt of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    # Who only reads, on a login node say, does without torch.
    from hvdlm.data.loader import StepBatch

FILE_NAME = "ledger.jsonl"


@final
class Ledger:
    """Appends this attempt's rows; rank 0 alone holds one.

    An attempt opens with `{"attempt", "resumed_at", "micro_batch"}`: rows of earlier attempts from
    step `resumed_at` on are void, because their work was done again.

    Args:
        run_folder: where the file lies; it is created if missing.
        attempt: number of this start of the run, from 1.
        resumed_at: first step this attempt does.
        micro_batch: samples of each slot of its steps.
    """

    def __init__(self, run_folder: Path, *, attempt: int, resumed_at: int, micro_batch: int) -> None:
        self._attempt = attempt
        end_last_line(run_folder / FILE_NAME)
        self._file = (run_folder / FILE_NAME).open("a", encoding="utf-8")
        self._write({"attempt": attempt, "resumed_at": resumed_at, "micro_batch": micro_batch})
        self.sync()

    def add(self, row: dict[str, int]) -> None:
        """Note that a step consumed the samples [first_sample, end_sample)."""
        self._write(row)

    def sync(self) -> None:
        """Make all rows durable; called before a checkpoint is committed."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left."""
        self.sync()
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def row_of(batch: StepBatch, *, world_size: int, attempt: int) -> dict[str, int]:
    """What the ledger says of a step."""
    return {
        "step": batch.step,
        "first_sample": batch.first_sample,
        "end_sample": batch.end_sample,
        "world_size": world_size,
        "attempt": attempt,
    }


def add_missing(run_folder: Path, rows: Sequence[dict[str, int]]) -> None:
    """Add rows that their attempts' rank 0 did not live to write.

    Args:
        run_folder: where the ledger lies.
        rows: of steps that were done, in their order.
    """
    path = run_folder / FILE_NAME
    there = {(row.get("attempt"), row.get("step")) for row in read_rows(path)}
    end_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            if (row["attempt"], row["step"]) not in there:
                file.write(json.dumps(row) + "\n")


def attempts(run_folder: Path) -> int:
    """How often the run was started, by its ledger; 0 where there is none."""
    path = run_folder / FILE_NAME
    if not path.exists():
        return 0
    numbers = [row["attempt"] for row in read_rows(path) if "resumed_at" in row]
    return max(numbers, default=0)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a line that a crash cut short is left out."""
    return parse_rows(path.read_text(encoding="utf-8", errors="replace"))


def parse_rows(text: str) -> list[dict[str, Any]]:
    """Objects of JSON lines; what is none is left out."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def end_last_line(path: Path) -> None:
    """End a line that a crash cut short, so that the next one does not continue it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
