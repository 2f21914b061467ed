"""A shuffle whose samples of one time lie near each other on disk, for file systems slow at random reads.

The n windows of a source are cut into chunks of consecutive windows. Each epoch has an order of the chunks,
and in that order as many consecutive chunks as fit in `data.shuffle_mb` make a group; samples are shuffled
within their group. Pure arithmetic, as `hvdlm.data.order`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdlm.data.order import CHUNKS, GROUPS, shuffle, shuffle_keys

CHUNK_BYTES = 4 << 20
"""Bytes of tokens read in one go: enough that seeking costs little, and some make a group."""


@dataclass(frozen=True)
class Chunks:
    """Windows a chunk, and chunks a group; both at least 1."""

    windows: int
    group: int

    @property
    def group_windows(self) -> int:
        """Windows a group."""
        return self.windows * self.group


def chunks_within(shuffle_mb: int, window_bytes: int) -> Chunks | None:
    """Chunks of about 4 MiB, in groups of at most `shuffle_mb` MiB where that is one at least.

    Returns:
        None where `shuffle_mb` is 0: the shuffle is over everything.
    """
    if not shuffle_mb:
        return None
    windows = max(1, CHUNK_BYTES // window_bytes)
    return Chunks(windows, max(1, (shuffle_mb << 20) // (windows * window_bytes)))


def permute_near(
    positions: np.ndarray, n: int | np.ndarray, chunks: Chunks, *, seed: int, epochs: np.ndarray
) -> np.ndarray:
    """Shuffle positions of epochs within groups of chunks: a bijection of 0..n-1 for every (seed, epoch).

    Args:
        positions: int64 [k], each in 0..n-1.
        n: Windows in the source, at least 1; one for all or int64 [k].
        chunks: How it is cut.
        seed: Any integer.
        epochs: int64 [k] or [1].

    Returns:
        int64 [k], each in 0..n-1.
    """
    order = _ChunkOrder.of(n, chunks, seed=seed, epochs=epochs)
    # With the hole of the last chunk filled, all groups but the last are of one size.
    whole = np.where(positions < order.group_end(order.short_group), positions, positions + order.hole)
    group = whole // chunks.group_windows
    start, end = order.group_start(group), order.group_end(group)
    mixed = start + shuffle(positions - start, end - start, shuffle_keys(GROUPS, seed, epochs, group))
    rank, offset = np.divmod(mixed + order.hole * (mixed >= order.hole_at), chunks.windows)
    return shuffle(rank, order.count, order.keys) * chunks.windows + offset


def unpermute_near(
    windows: np.ndarray, n: int | np.ndarray, chunks: Chunks, *, seed: int, epochs: np.ndarray
) -> np.ndarray:
    """The inverse of `permute_near`: the position of each window in its epoch, int64 [k]."""
    order = _ChunkOrder.of(n, chunks, seed=seed, epochs=epochs)
    chunk, offset = np.divmod(windows, chunks.windows)
    rank = shuffle(chunk, order.count, order.keys, inverse=True)
    mixed = rank * chunks.windows + offset - order.hole * (rank > order.short_rank)
    group = rank // chunks.group
    start, end = order.group_start(group), order.group_end(group)
    keys = shuffle_keys(GROUPS, seed, epochs, group)
    return start + shuffle(mixed - start, end - start, keys, inverse=True)


@dataclass(frozen=True, eq=False)
class _ChunkOrder:
    """The chunks of epochs in their order; each field is one value or [k].

    The last chunk of the source may be short: `hole` windows of it are missing, and it comes at
    `short_rank` in the order, so everything behind it moves up by the hole.
    """

    chunks: Chunks
    keys: np.ndarray
    count: np.ndarray
    hole: np.ndarray
    short_rank: np.ndarray

    @staticmethod
    def of(n: int | np.ndarray, chunks: Chunks, *, seed: int, epochs: np.ndarray) -> _ChunkOrder:
        keys, count = shuffle_keys(CHUNKS, seed, epochs), -(-np.asarray(n) // chunks.windows)
        last = np.broadcast_to(count - 1, np.broadcast_shapes(count.shape, keys.shape))
        short_rank = shuffle(last, count, keys, inverse=True)
        return _ChunkOrder(chunks, keys, count, count * chunks.windows - n, short_rank)

    @property
    def short_group(self) -> np.ndarray:
        return self.short_rank // self.chunks.group

    @property
    def hole_at(self) -> np.ndarray:
        """The first position, along the order, behind the short chunk."""
        return (self.short_rank + 1) * self.chunks.windows - self.hole

    def group_start(self, group: np.ndarray) -> np.ndarray:
        return group * self.chunks.group_windows - self.hole * (group > self.short_group)

    def group_end(self, group: np.ndarray) -> np.ndarray:
        whole = np.minimum((group + 1) * self.chunks.group_windows, self.count * self.chunks.windows)
        return whole - self.hole * (group >= self.short_group)
