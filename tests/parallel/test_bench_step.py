"""`bench step` on two ranks, and the run that takes its word."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvdlm.parallel import STRATEGIES
from tests import helpers

BENCH = (sys.executable, "-m", "hvdlm.bench", "step", "--json")


def test_every_strategy_is_timed_and_auto_takes_the_fastest(tiny_data: Path, tmp_path: Path) -> None:
    options = ["--blocks", "2", "--micro-batch", "1", "--wires", "none", "bf16"]
    done = helpers.run([*helpers.mpirun(2), *BENCH, *options], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout.splitlines()[-1])["strategies"]
    kinds = {(row["strategy"], row["wire"]) for row in result["rows"]}
    assert kinds == {(name, "none") for name in ("none", *STRATEGIES)} | {
        ("buckets", "bf16"),
        ("zero1", "bf16"),
    }
    assert all(
        row["ms"] > 0 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in result["rows"]
    )
    saved = tmp_path / "data" / "bench-step.json"
    assert json.loads(saved.read_text()) == result

    for row in result["rows"]:
        row["ratio"] = 0.5 if row["strategy"] == "zero1" else 1.0
    saved.write_text(json.dumps(result))
    command = helpers.train_command(tiny_data, tmp_path / "run", "--parallel.strategy", "auto")
    trained = helpers.run([*helpers.mpirun(2), *command], cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout
    assert "auto: zero1, by data/bench-step.json" in trained.stdout
    assert "strategy zero1" in trained.stdout
