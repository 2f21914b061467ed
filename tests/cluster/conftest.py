"""One Slurm for all tests of this folder; where none can be started they are skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import one_machine


@pytest.fixture(scope="session")
def slurm_conf() -> Iterator[Path]:
    """The configuration file of a running Slurm."""
    if reason := one_machine.missing():
        pytest.skip(reason)
    with one_machine.running() as conf:
        yield conf


@pytest.fixture
def slurm(slurm_conf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """srun, sbatch and the like speak to this Slurm; no job outlives the test."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
