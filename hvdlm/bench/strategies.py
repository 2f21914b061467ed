"""Optimizer steps under every strategy, beside DDP and beside no communication, in turn in one run."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvdlm.comm import device
from hvdlm.comm.launch import Launch
from hvdlm.comm.torch_group import close_group
from hvdlm.comm.world import World
from hvdlm.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, UserError, check
from hvdlm.data.loader import Slot, StepBatch
from hvdlm.models import MODELS
from hvdlm.models.compilation import compile_blocks_
from hvdlm.parallel import STRATEGIES, StepPlan, Strategy, Wish

NO_COMMUNICATION = "none"
VOCAB = 4096


SMALL = ModelConfig(layers=6, width=384, heads=6)


@dataclass(frozen=True)
class Work:
    """What a rank does in a step: micro-batches of sequences for a model, computed in `precision`."""

    slots: int
    micro_batch: int
    seq_len: int = 256
    model: ModelConfig = SMALL
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        """In all of them."""
        return self.slots * self.micro_batch * self.seq_len


def variants(wires: list[str]) -> list[tuple[str, str]]:
    """(strategy, precision on the wire) of what is compared; no communication first."""
    pairs = [(name, wire) for name in STRATEGIES for wire in wires if _is_possible(name, wire)]
    return [(NO_COMMUNICATION, "none"), *pairs]


def _is_possible(name: str, wire: str) -> bool:
    section = ParallelConfig(strategy=name, compression=wire)  # type: ignore[arg-type]
    try:
        check(RunConfig(parallel=section))
    except UserError:
        return False
    return True


def measure(
    ranks: World, *, blocks: int, wires: list[str], parallel: ParallelConfig, work: Work
) -> dict[str, Any]:
    """Time steps of a language model; every rank computes as much whatever their number.

    Args:
        ranks: all take part.
        blocks: steps of each variant that are timed; one more warms it up, and two of DDP, which lays
            out its buckets anew after its first.
        wires: precisions on the wire.
        parallel: bucket and fusion sizes.
        work: a step of each rank.

    Returns:
        Of each variant the median `ms` of a step (the slowest rank's), `tokens_per_s` over all ranks and
        `ratio`, the median over the blocks of its time by that of the block without communication, with
        its quartiles; and what was measured.

    Collective: yes.
    """
    here = device.pick("auto", ranks.local_rank)
    device.require_reductions(ranks, here)
    torch.manual_seed(0)
    model = MODELS[work.model.kind](work.model, VOCAB).to(here)
    kinds = variants(wires)
    built = {kind: _build(kind, copy.deepcopy(model), ranks, parallel, work) for kind in kinds}
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    for block in range(blocks + 2):
        batch = _batch(block + 1, ranks, work)
        for kind, strategy in built.items():
            ranks.barrier(name="bench.begin")
            own = _time_step(strategy, batch, here)
            seconds[kind].append(max(ranks.gather_json(own, name="bench.seconds")))
    close_group()
    tokens = ranks.size * work.tokens
    none = seconds[NO_COMMUNICATION, "none"][2:]
    return {
        "ranks": ranks.size,
        "launch": ranks.kind,
        "device": here.type,
        "precision": work.precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_a_rank": tokens // ranks.size,
        "threads": torch.get_num_threads(),
        "bucket_mb": parallel.bucket_mb,
        "torch": torch.__version__,
        "rows": [_row(kind, seconds[kind][2:], none, tokens) for kind in kinds],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['tokens_a_rank']} tokens a rank and step, "
        f"{result['ranks']} rank(s) ({result['launch']}), {result['threads']} thread(s) each, "
        f"{result['device']}, {result['precision']}, torch {result['torch']}",
        f"{'strategy':<12}{'wire':<6}{'ms a step':>10}{'tokens/s':>11}{'x none':>8}  quartiles",
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        lines.append(
            f"{row['strategy']:<12}{row['wire']:<6}{row['ms']:>10.1f}{row['tokens_per_s']:>11,.0f}"
            f"{row['ratio']:>8.3f}  {low:.3f} {high:.3f}"
        )
    return "\n".join(lines)


def _build(
    kind: tuple[str, str],
    model: nn.Module,
    ranks: World,
    parallel: ParallelConfig,
    work: Work,
) -> Strategy:
    if work.model.compile:
        compile_blocks_(model)
    name, wire = kind
    world = World(Launch("single")) if name == NO_COMMUNICATION else ranks
    section = ParallelConfig(
        compression=wire,  # type: ignore[arg-type]
        bucket_mb=parallel.bucket_mb,
        fusion_mb=parallel.fusion_mb,
    )
    plan = StepPlan(OptimConfig(), section, work.precision, work.slots)
    return STRATEGIES["buckets" if name == NO_COMMUNICATION else name](model, world, plan)


def _batch(step: int, ranks: World, work: Work) -> StepBatch:
    """This rank's slots of random ids."""
    generator = torch.Generator().manual_seed(1000 * step + ranks.rank)
    shape = (work.micro_batch, work.seq_len + 1)
    ids = [torch.randint(0, VOCAB, shape, generator=generator) for _ in range(work.slots)]
    first = ranks.rank * work.slots
    own = [Slot(first + i, i, {"tokens": x[:, :-1], "labels": x[:, 1:]}) for i, x in enumerate(ids)]
    samples = ranks.size * work.slots * work.micro_batch
    return StepBatch(step, (step - 1) * samples, step * samples, samples * work.seq_len, own)


def _time_step(strategy: Strategy, batch: StepBatch, here: torch.device) -> float:
    begin = time.perf_counter()
    stats = strategy.step(batch, 1e-4, wish=Wish)
    if here.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if not math.isfinite(stats.loss):
        raise RuntimeError("the loss of a benchmark step is not finite")
    return seconds


def _row(kind: tuple[str, str], seconds: list[float], none: list[float], tokens: int) -> dict[str, Any]:
    ratios = [mine / theirs for mine, theirs in zip(seconds, none, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "strategy": kind[0],
        "wire": kind[1],
        "ms": 1000 * statistics.median(seconds),
        "tokens_per_s": tokens / statistics.median(seconds),
        "ratio": middle,
        "quartiles": [low, high],
    }
