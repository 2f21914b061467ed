"""Starts that end without a checkpoint: after three in a row nobody should start again unseen.

exit.json carries the count, so taking that file away begins to count anew, and so does any checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_NO_PROGRESS, EXIT_USAGE, UserError
from hvdlm.run import exit_record

_STARTS = 3
_ERROR_CHARACTERS = 200


def starts_without_progress(run_folder: Path, step: int) -> int:
    """How many starts in a row ended without a checkpoint newer than the one they began from.

    Args:
        run_folder: of the run.
        step: of the newest checkpoint.

    Raises:
        UserError: they are too many (exit code 93), which exit.json then says.
    """
    record = exit_record.read(run_folder)
    count = _count(record, step)
    if count < _STARTS:
        return count
    attempt = record.get("attempt", 0)
    exit_record.write(
        run_folder,
        "no_progress",
        attempt=attempt,
        step=step,
        exit_code=EXIT_NO_PROGRESS,
        starts_without_progress=count,
    )
    ends = "; ".join(_end_of(run_folder, n) for n in range(max(1, attempt - _STARTS + 1), attempt + 1))
    raise UserError(
        f"{run_folder}: the last {count} starts ended without a checkpoint after step {step}: {ends}. "
        f"Mend the cause (or save more often: checkpoint.every), rm {run_folder / exit_record.FILE_NAME}",
        EXIT_NO_PROGRESS,
    )


def _count(record: dict[str, Any], step: int) -> int:
    """What the last start's record says, now that the newest checkpoint is of `step`."""
    state = record.get("state")
    if state not in ("running", "failed", "no_progress") or record.get("step") != step:
        return 0
    before = int(record.get("starts_without_progress", 0))
    # A mistake of the user's is told to the user, and counts as no start.
    refused = state == "no_progress" or record.get("exit_code") == EXIT_USAGE
    return before if refused else before + 1


def _end_of(run_folder: Path, attempt: int) -> str:
    """What an attempt said at its end: the first of its ranks that said something."""
    try:
        paths = exit_record.failures(run_folder, attempt)
        record = json.loads(min(paths, key=lambda path: path.stat().st_mtime).read_text())
        return (
            f"attempt {attempt}, rank {record['rank']}: {record['error'].splitlines()[0][:_ERROR_CHARACTERS]}"
        )
    except (OSError, ValueError, KeyError, IndexError):
        return f"attempt {attempt} ended without a word"
