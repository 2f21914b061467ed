"""What a run's files tell of its pace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdlm.run.standing import SaveCost, best_interval_s, job_times, read_standing


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_done_again_do_not_count(tmp_path: Path) -> None:
    """Steps 1 to 4, then from 3 again; 100 tokens a step, two seconds each."""
    steps = [(1, s) for s in (1, 2, 3, 4)] + [(2, s) for s in (3, 4, 5)]
    ledger: list[dict[str, Any]] = [{"attempt": 1, "resumed_at": 1}]
    for attempt, step in steps:
        if (attempt, step) == (2, 3):
            ledger.append({"attempt": 2, "resumed_at": 3})
        place = {"first_sample": 8 * (step - 1), "end_sample": 8 * step}
        ledger.append({"step": step, **place, "world_size": 2, "attempt": attempt})
    write(tmp_path / "ledger.jsonl", ledger)
    metrics: list[dict[str, Any]] = [
        {"kind": "train", "step": s, "loss": 1.0 * s, "tokens": 100 * s, "tokens_per_s": 50.0}
        for _, s in steps
    ]
    times = {"snapshot_s": 1.0, "stall_s": 2.0, "commit_s": 0.5, "write_s": 30.0}
    write(tmp_path / "metrics.jsonl", [*metrics, {"kind": "save", "step": 4, **times, "bytes": 1}])
    found = read_standing(tmp_path)
    assert (found.attempts, found.step, found.loss, found.steps_done, found.steps_kept) == (2, 5, 5.0, 7, 5)
    assert (found.tokens_per_s, found.step_s, found.training_s) == (50.0, 2.0, 14.0)
    assert found.save == SaveCost(stall_s=3.5, write_s=31.5)


def test_a_run_that_has_not_begun_has_done_nothing(tmp_path: Path) -> None:
    assert read_standing(tmp_path).step == 0
    assert read_standing(tmp_path).save is None


def test_the_interval_is_young_s_and_no_shorter_than_a_save() -> None:
    assert best_interval_s(SaveCost(stall_s=2.0, write_s=10.0), 10000.0) == pytest.approx(200.0)
    assert best_interval_s(SaveCost(stall_s=0.001, write_s=10.0), 10000.0) == 10.0


def test_jobs_that_end_without_a_word_are_failures() -> None:
    rows = [
        {"job": "1", "event": "begun", "time_unix": 0.0, "ends_unix": 100.0},
        {"job": "1", "event": "ended", "time_unix": 90.0, "exit_code": 75},
        {"job": "2", "event": "begun", "time_unix": 100.0, "ends_unix": 200.0},
        {"job": "3", "event": "begun", "time_unix": 500.0, "ends_unix": 600.0},
        {"job": "3", "event": "ended", "time_unix": 510.0, "exit_code": 1},
        {"job": "4", "event": "begun", "time_unix": 520.0, "ends_unix": 620.0},
    ]
    times = job_times(rows, running={"4"}, now_unix=550.0)
    assert (times.wall_s, times.failures) == (90.0 + 100.0 + 10.0 + 30.0, 2)
    assert job_times(rows, running=set(), now_unix=550.0).failures == 3


def test_a_login_node_needs_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'h5py', 'mpi4py'}"
    code = f"import sys, hvdlm.slurm.__main__; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
