"""The training loop beside a bare PyTorch loop of the same model, in turn, each in its own process.

The real loop runs with its real loader, strategy, ledger, metrics and signals. Its loader hands
control to the other process after every block of steps; there the bare loop (forward, backward,
clip, fused AdamW on batches that lie in memory) does as many.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch

from hvdlm.bench.bare import Bare, Steps, bare_loop, wait_for
from hvdlm.comm import device
from hvdlm.comm.world import World
from hvdlm.config import RunConfig
from hvdlm.config.parse import load_config
from hvdlm.corpus import demo
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.train.agree import agree_on_start
from hvdlm.train.loop import train
from hvdlm.train.session import open_session


def measure(*, blocks: int, block_steps: int, ranks: World, flags: list[str]) -> dict[str, Any]:
    """Time both loops, on one rank.

    Args:
        blocks: of each loop that are timed.
        block_steps: steps of each.
        ranks: this process.
        flags: of the run, where it is another than the demo's.

    Returns:
        `loop_ms` and `bare_ms` (median step of each), and `overhead`: the median over the blocks of
        loop / bare - 1 with its quartiles, where a block of the real loop is compared with the mean
        of the bare blocks before and after it. `cpu_overhead` is the same of the CPU time of all
        threads: it hardly feels other programs, but with two threads or more it counts waiting ones.
    """
    # A block is timed when the loop asks for the next one; the first one warms up.
    steps = (blocks + 1) * block_steps + 1
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        flags = ["--train.steps", str(steps), "--train.out", folder, "--eval.batches", "0", *flags]
        config, _ = load_config(["--checkpoint.every", "0", *flags], prog="bench step")
        for data_folder in config.data.weights:
            demo.prepare(Path(data_folder))
        pacer = _run(config, Path(folder), ranks, block_steps)
    return _summary(pacer.loop, pacer.bare, block_steps)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    low, high = result["overhead_quartiles"]
    spread = f"quartiles {low:.1%} to {high:.1%}; {result['blocks']} blocks"
    return (
        f"hvdlm.train  {result['loop_ms']:8.2f} ms a step\n"
        f"bare PyTorch {result['bare_ms']:8.2f} ms a step\n"
        f"overhead {result['overhead']:8.1%}  ({spread})\n"
        f"CPU time {result['cpu_overhead']:8.1%}  (all threads of the process)"
    )


@final
class Pacer:
    """A loader that measures what happens between its batches, and lets the bare loop run in the pauses.

    Attributes:
        loop: of each block of the real loop, seconds by the clock and of CPU time.
        bare: the same of the bare blocks; each block of the real loop stands between two of them.
    """

    def __init__(self, loader: Loader, bare: Connection, block_steps: int, where: torch.device) -> None:
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._loader = loader
        self._connection = bare
        self._block_steps = block_steps
        self._device = where

    def steps(self, start_step: int) -> Iterator[StepBatch]:
        """The loader's steps."""
        batches = self._loader.steps(start_step)
        while True:
            self._connection.send("a block")
            self.bare.append(self._connection.recv())
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            for _ in range(self._block_steps):
                yield next(batches)
            wait_for(self._device)
            self.loop.append((time.perf_counter() - begin_s, time.process_time() - begin_cpu_s))

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()


def _run(config: RunConfig, run_folder: Path, ranks: World, block_steps: int) -> Pacer:
    agreed = agree_on_start(config, run_folder, ranks)
    session = open_session(config, run_folder, ranks, agreed)
    vocab_size = agreed.tokenizer.vocab_size
    steps = _steps(session.loader, block_steps)
    where = device.pick(config.train.device, ranks.local_rank)
    bare = Bare(config.model, config.optim, vocab_size, config.train.precision, where)
    with bare_loop(bare, steps) as connection:
        pacer = Pacer(session.loader, connection, block_steps, where)
        train(replace(session, loader=cast(Loader, pacer)))
    return pacer


def _steps(loader: Loader, count: int) -> Steps:
    """The first steps' windows, as a loop without a loader would hold them."""
    batches = loader.steps(0)
    slots = [[slot.batch for slot in next(batches).slots] for _ in range(count)]
    return [[torch.cat((b["tokens"], b["labels"][:, -1:]), 1).numpy() for b in step] for step in slots]


def _summary(
    loop: list[tuple[float, float]], bare: list[tuple[float, float]], block_steps: int
) -> dict[str, Any]:
    """Medians; the first block warms up and is left out."""
    loop_s, loop_cpu_s = np.array(loop[1:]).T
    bare_s, bare_cpu_s = _between(np.array(bare[1:]))[: len(loop_s)].T
    quartiles = statistics.quantiles(loop_s / bare_s - 1, n=4, method="inclusive")
    return {
        "loop_ms": 1000 * float(np.median(loop_s)) / block_steps,
        "bare_ms": 1000 * float(np.median(bare_s)) / block_steps,
        "overhead": float(np.median(loop_s / bare_s)) - 1,
        "overhead_quartiles": [quartiles[0], quartiles[2]],
        "cpu_overhead": float(np.median(loop_cpu_s / bare_cpu_s)) - 1,
        "blocks": len(loop_s),
        "threads": torch.get_num_threads(),
    }


def _between(blocks: np.ndarray) -> np.ndarray:
    """Means of neighbors, [blocks, 2] -> [blocks - 1, 2]."""
    return (blocks[:-1] + blocks[1:]) / 2
