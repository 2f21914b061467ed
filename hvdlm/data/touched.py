"""Which shards some steps of a run read: the order's arithmetic, run ahead of the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hvdlm.data.blend import Blend, windows_of_samples
from hvdlm.data.entries import ShardEntry
from hvdlm.data.loader import BatchPlan, chunks_of
from hvdlm.data.order import first_windows, share_of
from hvdlm.data.sources import Source, shards_of, tokens_of, window_counts

_BLOCK_SAMPLES = 1 << 16
_MOST_SAMPLES = 1 << 24
"""Looked at before the rest is taken for touched: seconds, where a long run would take hours."""


def samples_of(
    plan: BatchPlan, *, start_step: int, end_step: int, shares: Iterable[tuple[int, int]]
) -> Iterator[np.ndarray]:
    """The global samples that some data coordinates take, in blocks.

    Args:
        plan: Of the run.
        start_step: Completed steps.
        end_step: The last step.
        shares: (d, D) of each coordinate.

    Yields:
        int64 [k].
    """
    slots = np.array([slot for share in shares for slot in share_of(plan.slots, share)], np.int64)
    in_step = (slots[:, None] * plan.micro_batch + np.arange(plan.micro_batch)).reshape(-1)
    steps_a_block = max(1, _BLOCK_SAMPLES // max(1, len(in_step)))
    for first in range(start_step, end_step if len(slots) else start_step, steps_a_block):
        steps = np.arange(first, min(first + steps_a_block, end_step))
        yield (steps[:, None] * plan.global_batch + in_step).reshape(-1)


def touched_shards(
    sources: Sequence[Source], split: str, samples: Iterable[np.ndarray], *, plan: BatchPlan, blend: Blend
) -> list[tuple[Path, ShardEntry]]:
    """The shards that samples lie in, with their folders, in the order of `shards_of`.

    In random order a run that is not short touches every shard: then this ends after the first
    blocks. Where some shard is still untouched after 2^24 samples all are named: it is then so small
    that copying it needlessly costs less than looking on.

    Args:
        sources: The data sets.
        split: "train" or "val".
        samples: int64 [k] each: global samples, none before the blend's first.
        plan: Of the run.
        blend: How samples are drawn from the sources.

    Raises:
        UserError: A source has no sample.
    """
    shards, counts = shards_of(sources, split), window_counts(sources, split, plan.seq_len)
    first, chunks = first_windows(tokens_of(sources, split), plan.seq_len), chunks_of(sources, plan)
    has_windows = np.diff(first) > 0
    touched, looked_at = np.zeros(len(shards), np.bool_), 0
    for block in samples:
        windows = windows_of_samples(block, counts, seed=plan.seed, blend=blend, chunks=chunks)
        touched[np.searchsorted(first, windows, side="right") - 1] = True
        looked_at += len(block)
        if looked_at >= _MOST_SAMPLES:
            touched = has_windows
        if (touched >= has_windows).all():
            break
    return [shard for shard, is_touched in zip(shards, touched, strict=True) if is_touched]
