"""Schedules, the plateau, loss spikes, stragglers, the memory that is left."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from hvdlm.config import OptimConfig
from hvdlm.run.node_memory import Left, memory_left
from hvdlm.run.plateau import Plateau
from hvdlm.run.schedule import learning_rate
from hvdlm.run.spikes import WINDOW, loss_limit
from hvdlm.run.stragglers import Stragglers, slowdown

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {60: 0.55, 110: 0.1}),
        ("wsd", {88: 1.0, 93: 1 - 0.9 * math.sqrt(5 / 22), 110: 0.1}),
        ("inverse_sqrt", {40: 0.5, 4000: 0.1}),
    ],
)
def test_the_rate_follows_its_schedule(schedule: str, expected: dict[int, float]) -> None:
    optim = replace(OPTIM, schedule=schedule)
    assert learning_rate(5, optim, 110) == pytest.approx(0.5)
    for step, rate in expected.items():
        assert learning_rate(step, optim, 110) == pytest.approx(rate)


def test_a_plateau_halves_the_rate_and_then_ends_the_run() -> None:
    optim = replace(OPTIM, schedule="plateau", plateau_patience=2, min_lr=0.3)
    seen, rates = Plateau(), []
    for loss in (3.0, 2.0, 1.9999, math.nan, 2.0, 2.0, 2.0, 2.0):
        seen = seen.after(loss, optim)
        rates.append(learning_rate(50, optim, 100, scale=seen.scale))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.3, 0.3, 0.3]
    assert seen.finished


def test_a_spike_is_above_the_mean_by_so_many_sigmas() -> None:
    losses = [1.0, 3.0] * (WINDOW // 2)
    assert loss_limit(losses, 6.0) == pytest.approx(8.0)
    assert loss_limit(losses, 0.0) == loss_limit(losses[1:], 6.0) == math.inf
    assert loss_limit([0.3] * WINDOW, 6.0) == pytest.approx(0.3 * 1.06)


def test_a_rank_that_stays_slow_is_named_once() -> None:
    stragglers = Stragglers()
    assert [stragglers.look([10, 10, None, ms]) for ms in (14, 10, 14, 14, 14, 14)] == [[]] * 4 + [[3], []]


def test_of_two_ranks_the_slower_one_is_named() -> None:
    stragglers = Stragglers()
    assert [stragglers.look([10, 14]) for _ in range(3)] == [[], [], [1]]
    assert slowdown([10, 14]) == (1, 1.4)


def test_the_tightest_cgroup_counts_without_the_cache_of_files(tmp_path: Path) -> None:
    job = tmp_path / "slurm/job_1"
    (job / "step_0").mkdir(parents=True)
    (tmp_path / "cgroup.controllers").touch()
    (tmp_path / "own").write_text("0::/slurm/job_1/step_0\n")
    for folder, limit in ((job, "1000000"), (job / "step_0", "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("990000\n")
        (folder / "memory.stat").write_text("anon 900000\nactive_file 20000\ninactive_file 5000\n")
    assert memory_left(own=tmp_path / "own", cgroups=tmp_path) == Left(35000, 1000000)
