"""Which draw of which source each sample of a blend is: pure arithmetic, the same for any number of ranks.

Samples come in blocks of 4096. Before every block each source has been drawn as often as its weight says,
within one sample; inside a block the draws are mixed by a keyed permutation. The draws of a source are
numbered in the order in which they come, so after any sample those made are 0, 1, … without a gap, and
draw i is the window that sample i would be if the source were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from hvdlm.config.check import BLOCK_SAMPLES
from hvdlm.data.locality import Chunks, permute_near
from hvdlm.data.order import SLOTS, permute, shuffle, shuffle_keys


@dataclass(frozen=True)
class Blend:
    """Sources mixed by integer weights from a sample on.

    Attributes:
        weights: Of each source, at least 1, and at least 1/4096 of their sum, which is below 2^31.
        drawn: Draws of each source before `first_sample`.
        first_sample: Where the first block begins.
    """

    weights: tuple[int, ...]
    drawn: tuple[int, ...]
    first_sample: int = 0


ALONE = Blend((1,), (0,))
"""One source from the beginning."""


def windows_of_samples(
    samples: np.ndarray,
    counts: Sequence[int],
    *,
    seed: int,
    blend: Blend = ALONE,
    chunks: Chunks | None = None,
) -> np.ndarray:
    """The window of each global sample, numbered through all sources.

    Args:
        samples: int64 [k], none before the blend's first.
        counts: Windows of each source, at least 1.
        seed: Any integer.
        blend: Of as many sources.
        chunks: Within which groups of chunks samples are shuffled; None = over everything.

    Returns:
        int64 [k], each in 0..sum(counts)-1.
    """
    sources, draws = draws_of_samples(samples, blend, seed=seed)
    n: int | np.ndarray = counts[0]
    if len(counts) > 1:
        n = np.array(counts, np.int64)[sources]
    epochs, positions = draws // n, draws % n
    if chunks:
        windows = permute_near(positions, n, chunks, seed=seed, epochs=epochs)
    else:
        windows = permute(positions, n, seed=seed, epochs=epochs)
    return windows if len(counts) == 1 else windows + first_of(counts)[sources]


def first_of(counts: Sequence[int]) -> np.ndarray:
    """The first window of each source, int64, where they are numbered one after the other."""
    return np.cumsum(np.array([0, *counts[:-1]], np.int64))


def draws_of_samples(samples: np.ndarray, blend: Blend, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What each global sample draws.

    Args:
        samples: int64 [k], none before the blend's first.
        blend: The blend.
        seed: Any integer.

    Returns:
        Source uint16 [k], and the number of the draw in that source int64 [k].
    """
    places = samples - blend.first_sample
    if len(blend.weights) == 1:
        return np.zeros(len(places), np.uint16), places + blend.drawn[0]
    blocks, slots = np.divmod(places, BLOCK_SAMPLES)
    sources, draws = np.empty(len(places), np.uint16), np.empty(len(places), np.int64)
    for run in _runs(blocks):
        block_sources, block_draws = _block(int(blocks[run.start]), blend, seed)
        sources[run], draws[run] = block_sources[slots[run]], block_draws[slots[run]]
    return sources, draws


def draws_before(sample: int, blend: Blend, *, seed: int) -> tuple[int, ...]:
    """Draws of each source before a sample, those before the blend included."""
    block, slots = divmod(sample - blend.first_sample, BLOCK_SAMPLES)
    made = np.array(blend.drawn) + _planned(blend.weights, block * BLOCK_SAMPLES)
    if len(blend.weights) == 1:
        made += slots
    elif slots:
        made += np.bincount(_block(block, blend, seed)[0][:slots], minlength=len(made))
    return tuple(made.tolist())


def _planned(weights: Sequence[int], samples: int) -> np.ndarray:
    """Draws of each source, int64 [sources], in so many whole blocks: differences of exact floors."""
    edges = [samples * cumulated // sum(weights) for cumulated in accumulate(weights)]
    return np.diff(np.array([0, *edges], np.int64))


def _block(number: int, blend: Blend, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Source uint16 and draw int64 of each sample of a block."""
    before = _planned(blend.weights, number * BLOCK_SAMPLES)
    counts = _planned(blend.weights, (number + 1) * BLOCK_SAMPLES) - before
    in_order, slots = np.repeat(np.arange(len(counts), dtype=np.uint16), counts), np.arange(BLOCK_SAMPLES)
    sources = in_order[shuffle(slots, BLOCK_SAMPLES, shuffle_keys(SLOTS, seed, np.array([number])))]
    draws, first = np.empty(BLOCK_SAMPLES, np.int64), np.cumsum(counts) - counts
    draws[np.argsort(sources, kind="stable")] = slots + np.repeat(before + blend.drawn - first, counts)
    return sources, draws


def _runs(values: np.ndarray) -> Iterator[slice]:
    """The stretches of equal values, in order."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return (slice(start, stop) for start, stop in pairwise(edges) if stop > start)
