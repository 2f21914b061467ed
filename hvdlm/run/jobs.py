"""jobs.jsonl: the Slurm jobs of a run, as the batch script saw them begin and end.

exit.json knows a run's last start. This file knows which job that was, where its log lies, and the jobs
that ended before a start began.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.run.ledger import end_last_line, read_rows

FILE_NAME = "jobs.jsonl"

SUBMITTED, BEGUN, REFUSED, ENDED = "submitted", "begun", "refused", "ended"


def note(run_folder: Path, job: str, event: str, **fields: Any) -> None:
    """Add a row.

    Args:
        run_folder: is made where it is missing.
        job: its number.
        event: SUBMITTED, BEGUN, REFUSED or ENDED.
        fields: log, exit_code, error and the like.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / FILE_NAME
    end_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"job": job, "event": event, **fields, "time_unix": round(time.time(), 3)}) + "\n"
        )


def job_name(run_folder: Path) -> str:
    """The name of a run's jobs, by which Slurm runs one of them at a time: no other run has it."""
    path = run_folder.resolve()
    word = re.sub(r"[^\w.-]", "-", path.name)[:40]
    return f"hvdlm-{word}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def note_refusal(run_folder: Path, env: Mapping[str, str], *, exit_code: int, error: str) -> None:
    """Note that train would not begin, for the jobs that are queued behind this one; outside Slurm nothing.

    exit.json is left alone: it speaks of the last start that did begin.
    """
    job = env.get("SLURM_JOB_ID", "")
    if not job or not run_folder.is_dir():
        return
    try:
        note(run_folder, job, REFUSED, exit_code=exit_code, error=error)
    except OSError as second:
        print(f"hvdlm: the refusal is not noted in {run_folder / FILE_NAME}: {second}", flush=True)


def rows(run_folder: Path) -> list[dict[str, Any]]:
    """All rows, oldest first; none where there is no file."""
    path = run_folder / FILE_NAME
    return [row for row in read_rows(path) if "job" in row and "event" in row] if path.exists() else []
