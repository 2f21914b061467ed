"""Run by test_strategy_pairs under mpirun: `save FOLDER` under every strategy, then `resume FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hvdlm.comm import launch
from hvdlm.comm import world as worlds
from hvdlm.config import ParallelConfig
from hvdlm.parallel import STRATEGIES
from hvdlm.run import restore
from hvdlm.run.saver import Saver
from tests.parallel.test_strategies import OPTIM, never, new_model, new_strategy, reference_steps, step_batch

SAVED_STEP, LAST_STEP = 3, 8


def save(folder: Path, world: worlds.World) -> None:
    """The state after three steps of every strategy."""
    for name in STRATEGIES:
        strategy = new_strategy(name, new_model(), world)
        for step in range(1, SAVED_STEP + 1):
            strategy.step(step_batch(step, world), OPTIM.lr, wish=never)
        saver = Saver(folder / name, world, files={})
        saver.begin(strategy.pieces(), {"step": SAVED_STEP, "attempt": 1})
        assert saver.finish()


def resume(folder: Path, world: worlds.World) -> None:
    """From every saved state with every strategy the losses of one undisturbed process."""
    expected = [loss for loss, _ in reference_steps(new_model(), LAST_STEP)]
    for before in STRATEGIES:
        saved = restore.open_checkpoint(folder / before / f"step-{SAVED_STEP:08d}")
        for name in STRATEGIES:
            strategy = new_strategy(name, new_model(), world)
            strategy.load(saved.read)
            for step in range(SAVED_STEP + 1, LAST_STEP + 1):
                stats = strategy.step(step_batch(step, world), OPTIM.lr, wish=never)
                assert stats.loss == pytest.approx(expected[step - 1], rel=1e-5), (before, name, step)
            if world.is_root:
                print(f"{before} -> {name}", flush=True)


def main() -> None:
    here = launch.classify(os.environ)
    parallel = ParallelConfig(strategy="buckets")
    world = worlds.init(here, launch.process_settings(here, parallel, env=os.environ, cores=1, gpus=0))
    {"save": save, "resume": resume}[sys.argv[1]](Path(sys.argv[2]), world)
    world.close()


if __name__ == "__main__":
    main()
