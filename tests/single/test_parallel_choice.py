"""parallel.strategy=auto."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdlm.parallel.choice import choose


def bench_file(path: Path, **ratios: float) -> Path:
    rows = [{"strategy": name, "wire": "none", "ratio": ratio} for name, ratio in ratios.items()]
    rows.append({"strategy": "buckets", "wire": "bf16", "ratio": 0.1})
    path.write_text(json.dumps({"ranks": 2, "device": "cpu", "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        (
            {"none": 1.0, "allreduce": 1.08, "buckets": 1.02, "zero1": 1.05, "ddp": 0.9, "fixed": 0.9},
            "buckets",
        ),
        ({"allreduce": 1.08, "buckets": 1.06, "zero1": 1.02}, "zero1"),
        ({"allreduce": 1.02, "buckets": 1.015, "zero1": 1.5}, "allreduce"),
        ({"allreduce": 1.02}, "allreduce"),
    ],
)
def test_the_fastest_that_needs_nothing_else_is_taken(
    ratios: dict[str, float], chosen: str, tmp_path: Path
) -> None:
    strategy, why = choose(bench_file(tmp_path / "bench.json", **ratios))
    assert strategy == chosen
    assert f"auto: {chosen}" in why
    assert "bench.json" in why


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ranks": 2, "device": "cpu", "rows": []}', "\0", "3"])
def test_a_damaged_file_means_the_default(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    strategy, why = choose(path)
    assert strategy == "allreduce"
    assert str(path) in why


def test_without_a_measurement_it_says_how_to_make_one(tmp_path: Path) -> None:
    strategy, why = choose(tmp_path / "none.json")
    assert strategy == "allreduce"
    assert "hvdlm.bench step" in why
