"""Which shards some steps of a run read: the order's arithmetic, run ahead of the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from hvdlm.data.loader import BatchPlan
from hvdlm.data.manifest import Manifest
from hvdlm.data.order import first_windows, share_of, windows_of_samples

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
    manifest: Manifest, split: str, samples: Iterable[np.ndarray], *, seq_len: int, seed: int
) -> list[str]:
    """The names of the shards that samples lie in, in the manifest's order.

    In random order a run that is not short touches every shard: then this ends after the first
    blocks. Where some shard is still untouched after 2^24 samples all are named: it is then so small
    that copying it needlessly costs less than looking on.

    Args:
        manifest: Of the data set.
        split: "train" or "val".
        samples: int64 [k] each: numbers of samples of this data set.
        seq_len: T.
        seed: Of the order.
    """
    entries = manifest.split(split)
    first = first_windows(np.array([entry.tokens for entry in entries], dtype=np.int64), seq_len)
    has_windows, windows = np.diff(first) > 0, int(first[-1])
    touched, looked_at = np.zeros(len(entries), np.bool_), 0
    for block in samples if windows else ():
        shards = np.searchsorted(first, windows_of_samples(block, windows, seed=seed), side="right") - 1
        touched[shards] = True
        looked_at += len(block)
        if looked_at >= _MOST_SAMPLES:
            touched = has_windows
        if (touched >= has_windows).all():
            break
    return [entry.name for entry, is_touched in zip(entries, touched, strict=True) if is_touched]
