"""A run that changes its strategy and its number of ranks at every start follows one curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import helpers
from tests.parallel.test_train_ranks import GOLDEN

STARTS = [(3, "zero1"), (2, "buckets"), (1, "zero1"), (4, "ddp"), (2, "allreduce")]


def test_a_run_goes_on_under_other_strategies(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    for number, (ranks, strategy) in enumerate(STARTS, 1):
        last = number == len(STARTS)
        flags = ["--parallel.strategy", strategy, "--parallel.bucket_mb", "0.01"]
        command = helpers.train_command(tiny_data, run_folder, *flags)
        launched = [*helpers.mpirun(ranks), *command] if ranks > 1 else command
        with helpers.started(launched, {}) as process:
            if not last:
                # A start does some steps more, as it is asked to stop while it trains.
                helpers.wait_for_step(run_folder, 4 * number - 2)
                (run_folder / "STOP").touch()
            output, _ = process.communicate(timeout=120)
        assert process.returncode in (0, 75), output
        assert f"strategy {strategy}" in output or process.returncode == 0
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text()).items()}
    assert helpers.losses(run_folder) == pytest.approx(golden, rel=1e-4)
    assert len({row["attempt"] for row in helpers.rows(run_folder, "metrics.jsonl", kind="train")}) > 2
