"""A run that changes its strategy and its number of ranks at every start follows one curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import helpers
from tests.parallel.test_train_ranks import GOLDEN

STARTS = [(3, "zero1"), (2, "buckets"), (1, "zero1"), (4, "ddp"), (2, "allreduce")]


@pytest.mark.long
def test_a_run_goes_on_under_other_strategies(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    for number, (ranks, strategy) in enumerate(STARTS, 1):
        last = number == len(STARTS)
        flags = ["--parallel.strategy", strategy, "--parallel.bucket_mb", "0.01"]
        command = helpers.train_command(tiny_data, run_folder, *flags)
        launched = [*helpers.mpirun(ranks), *command] if ranks > 1 else command
        if not last:
            # It is there when the first step begins, so each start does a step or two.
            run_folder.mkdir(exist_ok=True)
            (run_folder / "STOP").touch()
        done = helpers.run(launched)
        assert done.returncode == (0 if last else 75), done.stdout
        assert f"strategy {strategy}" in done.stdout
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text()).items()}
    assert helpers.losses(run_folder) == pytest.approx(golden, rel=1e-4)
    attempts = {row["attempt"] for row in helpers.rows(run_folder, "metrics.jsonl", kind="train")}
    assert attempts == set(range(1, len(STARTS) + 1))
