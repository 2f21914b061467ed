"""The job's end without a Slurm; with one: tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdlm.cluster.job import JobEnd, job_end


def test_outside_a_job_nobody_is_asked() -> None:
    assert job_end({}) == JobEnd(0.0, "")


def test_what_slurm_puts_into_the_environment_is_believed() -> None:
    assert job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000"}) == JobEnd(1000.0, "")


def test_no_answer_is_told_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    end = job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "Unknown"})
    assert end == JobEnd(0.0, "squeue: cannot run squeue: No such file or directory")
