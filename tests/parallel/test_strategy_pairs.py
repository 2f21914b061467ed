"""A run goes on under any strategy on any number of ranks, whatever it was saved under."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hvdlm.parallel import STRATEGIES
from tests import helpers


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(3, 2), (1, 4), (4, 1)])
def test_every_strategy_goes_on_from_every_other(saved_on: int, resumed_on: int, tmp_path: Path) -> None:
    for ranks, what in ((saved_on, "save"), (resumed_on, "resume")):
        command = [sys.executable, "-m", "tests.parallel.strategy_pairs", what, str(tmp_path)]
        done = helpers.run([*helpers.mpirun(ranks), *command] if ranks > 1 else command)
        assert done.returncode == 0, done.stdout
    assert done.stdout.count(" -> ") == len(STRATEGIES) ** 2
