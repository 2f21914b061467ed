"""The training loop beside a bare PyTorch loop of the same model, in one process.

The real loop runs with its real loader, strategy, ledger, metrics and signals. Its loader hands
control back after every block of steps, and then the bare loop (forward, backward, clip, fused AdamW
on batches that lie in memory) does as many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import nn

from hvdlm.comm import launch, world
from hvdlm.config import RunConfig
from hvdlm.config.parse import load_config
from hvdlm.corpus import demo
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.parallel.replicated import adamw
from hvdlm.parallel.strategy import loss_of
from hvdlm.train.loop import train
from hvdlm.train.session import agree_on_start, build_model, open_session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench step`."""
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each loop (default: 12)")
    parser.add_argument("--block-steps", type=int, default=10, help="steps a block (default: 10)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both loops.

    Returns:
        `loop_ms` and `bare_ms` (median step of each), and `overhead`: the median over pairs of
        neighboring blocks of loop / bare - 1, with its quartiles.
    """
    # A block is timed when the loop asks for the next one.
    steps = (args.blocks + 1) * args.block_steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        flags = ["--train.steps", str(steps), "--train.out", folder, "--eval.batches", "0"]
        config, _ = load_config([*flags, "--checkpoint.every", "0"], prog="bench step")
        for data_folder in config.data.weights:
            demo.prepare(Path(data_folder))
        alone = launch.Launch("single")
        settings = launch.process_settings(
            alone, config.parallel, env=os.environ, cores=len(os.sched_getaffinity(0)), gpus=0
        )
        ranks = world.init(alone, settings)
        pacer = _run(config, Path(folder), ranks, args.block_steps)
        ranks.close()
    return _summary(pacer.loop_s, pacer.bare_s, args.block_steps)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    low, high = result["overhead_quartiles"]
    return (
        f"hvdlm.train  {result['loop_ms']:8.2f} ms a step\n"
        f"bare PyTorch {result['bare_ms']:8.2f} ms a step\n"
        f"overhead {result['overhead']:8.1%}  (quartiles {low:.1%} to {high:.1%}; {result['pairs']} pairs)"
    )


@final
class Pacer:
    """A loader that measures what happens between its batches, and runs the bare loop in the pauses."""

    def __init__(self, loader: Loader, bare: BareLoop, block_steps: int) -> None:
        self.loop_s: list[float] = []
        self.bare_s: list[float] = []
        self._loader = loader
        self._bare = bare
        self._block_steps = block_steps

    def steps(self, start_step: int) -> Iterator[StepBatch]:
        """The loader's steps."""
        batches = self._loader.steps(start_step)
        self._bare.batches = [next(batches) for _ in range(self._block_steps)]
        batches = self._loader.steps(start_step)
        while True:
            begin = time.perf_counter()
            for _ in range(self._block_steps):
                yield next(batches)
            self.loop_s.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            self._bare.run()
            self.bare_s.append(time.perf_counter() - begin)

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()


@final
class BareLoop:
    """What a person writes who trains this model on one device with PyTorch and nothing else."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.batches: list[StepBatch] = []
        self._model = model
        self._optimizer = adamw(model, config.optim)
        self._clip = config.optim.clip

    def run(self) -> None:
        """One step on each batch."""
        loss_sum_of = loss_of(self._model)
        for batch in self.batches:
            for slot in batch.slots:
                (loss_sum_of(**slot.batch)[0] / batch.label_count).backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad()


def _run(config: RunConfig, run_folder: Path, ranks: world.World, block_steps: int) -> Pacer:
    agreed = agree_on_start(config, run_folder, ranks)
    session = open_session(config, run_folder, ranks, agreed)
    bare = BareLoop(build_model(config, agreed.tokenizer, ranks, resumed=False), config)
    pacer = Pacer(session.loader, bare, block_steps)
    train(replace(session, loader=cast(Loader, pacer)))
    return pacer


def _summary(loop_s: list[float], bare_s: list[float], block_steps: int) -> dict[str, Any]:
    """Medians; the first pair warms up and is left out."""
    pairs = list(zip(loop_s, bare_s, strict=False))[1:]
    ratios = [loop / bare - 1 for loop, bare in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "loop_ms": 1000 * statistics.median(loop for loop, _ in pairs) / block_steps,
        "bare_ms": 1000 * statistics.median(bare for _, bare in pairs) / block_steps,
        "overhead": statistics.median(ratios),
        "overhead_quartiles": [quartiles[0], quartiles[2]],
        "pairs": len(pairs),
        "threads": torch.get_num_threads(),
    }
