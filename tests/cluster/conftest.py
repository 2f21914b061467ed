"""One Slurm for all tests of this folder; where none can be started they are skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster import one_machine
from tests.cluster.one_machine import Machine


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A running Slurm."""
    if reason := one_machine.missing():
        pytest.skip(reason)
    with one_machine.running() as machine:
        yield machine


@pytest.fixture
def slurm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """srun, sbatch and the like speak to this Slurm; no job, and no harm, outlives the test."""
    monkeypatch.setenv("SLURM_CONF", str(machine.conf))
    with machine.joined():
        yield machine
        # Not only told to end: those who are would be waited for.
        for options in (["--state=PENDING"], ["--signal=KILL", "--full"], []):
            subprocess.run(["scancel", "--user=root", *options], check=True)
        machine.heal()
