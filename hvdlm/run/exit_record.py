"""exit.json: how the last start of a run ended, written by the rank that knows.

A launcher hides the culprit's code (`srun -K` turns a 7 into 143), so whoever decides what to do
next reads this file. Start-up writes the state *running*: a crash is what still says so.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from hvdlm.data.files import write_atomic

FILE_NAME = "exit.json"
ALL_STEPS, PLATEAU = "all steps", "plateau"
"""Reasons of a run that is done."""


def write(run_folder: Path, state: str, **fields: Any) -> None:
    """Replace exit.json.

    Args:
        run_folder: where it lies.
        state: running, done, stopped, failed or no_progress.
        fields: attempt, step, exit_code, reason and the like.
    """
    record = {"state": state, **fields, "time_unix": round(time.time(), 3)}
    write_atomic(run_folder / FILE_NAME, (json.dumps(record) + "\n").encode())


def read(run_folder: Path) -> dict[str, Any]:
    """The record, or an empty one where there is none."""
    try:
        record = json.loads((run_folder / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_failure(run_folder: Path, *, attempt: int, rank: int, exit_code: int, error: str) -> bool:
    """Note which rank failed first; only the first rank of an attempt gets into exit.json.

    Returns:
        True if this rank was the first.
    """
    record = {"attempt": attempt, "rank": rank, "host": socket.gethostname(), "exit_code": exit_code}
    record["error"] = error
    # Where it began, for the next start to see whether anything came of it.
    begun = read(run_folder)
    record |= {key: begun[key] for key in ("step", "starts_without_progress") if key in begun}
    folder = run_folder / "failed"
    folder.mkdir(exist_ok=True)
    fd = os.open(folder / f"{attempt}.{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps(record) + "\n")
    try:
        os.close(os.open(folder / f"{attempt}.first", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    write(run_folder, "failed", **record)
    return True


def last_attempt(run_folder: Path) -> int:
    """The highest number of an attempt that ended, or began, by these files; 0 where there is none."""
    failed = [int(path.name.partition(".")[0]) for path in (run_folder / "failed").glob("[0-9]*.*.json")]
    return max([read(run_folder).get("attempt", 0), *failed])


def failures(run_folder: Path, attempt: int) -> list[Path]:
    """The failure records of one attempt."""
    return sorted((run_folder / "failed").glob(f"{attempt}.*.json"))
