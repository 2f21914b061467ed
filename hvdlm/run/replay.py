"""The batch of one step, rebuilt from what a run left: each slot's samples, where they lie, and their ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.blend import windows_of_samples
from hvdlm.data.loader import MAX_OPEN_FILES, chunks_of
from hvdlm.data.order import first_windows, locate, slot_seed, step_samples
from hvdlm.data.sources import shards_of, tokens_of, window_counts
from hvdlm.data.windows import WindowReader
from hvdlm.run.audit import Recorded
from hvdlm.run.stages import Stage


@dataclass(frozen=True)
class ReplayedSample:
    """A sample: where it lies, and its seq_len + 1 ids, the last of which is a label alone."""

    sample: int
    source: str
    shard: str
    first_token: int
    ids: list[int]


@dataclass(frozen=True)
class ReplayedSlot:
    """A forward and backward pass: its index in the step, the seed of its random numbers, its samples."""

    slot: int
    rng_seed: int
    samples: list[ReplayedSample]


def replay(run: Recorded, step: int) -> list[ReplayedSlot]:
    """All slots of a step, whichever ranks had them.

    Raises:
        UserError: The run has not done this step, or a shard is missing or damaged.
    """
    if not 1 <= step <= run.checkpoint.step:
        raise UserError(
            f"--replay {step}: {run.checkpoint.folder} has the steps 1 to {run.checkpoint.step}: give one"
        )
    plan = run.plan
    samples = _read(run, np.arange(*step_samples(step, plan.global_batch)))
    # It may change from attempt to attempt; a ledger that does not say it is of one that did not.
    m = run.history.micro_batch(step) or plan.micro_batch
    return [
        ReplayedSlot(slot, slot_seed(plan.seed, step, slot), samples[slot * m : (slot + 1) * m])
        for slot in range(plan.global_batch // m)
    ]


def _read(run: Recorded, samples: np.ndarray) -> list[ReplayedSample]:
    """Samples int64 [k] of one stage."""
    plan, stage = run.plan, stage_of(run.stages, int(samples[0]))
    sources = run.sources_of(stage)
    windows = windows_of_samples(
        samples,
        window_counts(sources, "train", plan.seq_len),
        seed=plan.seed,
        blend=stage.blend,
        chunks=chunks_of(sources, plan),
    )
    places = locate(windows, first_windows(tokens_of(sources, "train"), plan.seq_len), plan.seq_len)
    shards, firsts = (values.tolist() for values in places)
    ids = np.empty((len(samples), plan.seq_len + 1), np.int64)
    reader = WindowReader(sources, "train", seq_len=plan.seq_len, max_open=MAX_OPEN_FILES)
    try:
        reader.read(shards, firsts, out=ids)
    finally:
        reader.close()
    entries = shards_of(sources, "train")
    return [
        ReplayedSample(sample, str(entries[shard][0]), entries[shard][1].name, first, row)
        for sample, shard, first, row in zip(samples.tolist(), shards, firsts, ids.tolist(), strict=True)
    ]


def stage_of(stages: tuple[Stage, ...], sample: int) -> Stage:
    """The stage that a sample is in."""
    return [stage for stage in stages if stage.first_sample <= sample][-1]
