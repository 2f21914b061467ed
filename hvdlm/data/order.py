"""Which sample comes where: pure arithmetic, O(1) memory, the same for any number of ranks.

A sample is a window of seq_len + 1 tokens at stride seq_len inside one shard. Draw i of a data set, in
a run of its own the global sample i, is window `permute(i % n)` of epoch i // n, a keyed permutation of
the n windows. Functions take whole arrays: one sample at a time costs eighty times as much.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash

ROUNDS = 8
_MASK64 = (1 << 64) - 1
_ORDER, _RNG = 1, 2
SLOTS, CHUNKS, GROUPS = 3, 4, 5
"""Domains, as are the two above: the order, the dropout and the blend of one seed share no key."""
# Source of the constants: splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators").
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF, _ONE = np.uint64(32), np.uint64(1)
_ROUND_KEYS = np.array([(i + 1) * 0xD1B54A32D192ED03 & _MASK64 for i in range(ROUNDS)], dtype=np.uint64)


def permute(positions: np.ndarray, n: int | np.ndarray, *, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Shuffle positions of epochs: a bijection of 0..n-1 for every (seed, epoch).

    A Feistel network over the smallest power of two that holds n, walked until the result is
    below n. It serves every n: a materialised shuffle would be a second order to keep alike, and
    its cost would grow with the number of epochs that a block of samples touches.

    Args:
        positions: int64 [k], each in 0..n-1.
        n: Windows in the split, at least 1; one for all or int64 [k].
        seed: Any integer.
        epochs: int64 [k]; seed and epoch enter the key separately, so seed 0 in epoch 1 differs
            from seed 1 in epoch 0.

    Returns:
        int64 [k], each in 0..n-1.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (cycle walking), 2002.
    """
    return shuffle(positions, n, shuffle_keys(_ORDER, seed, epochs))


def unpermute(windows: np.ndarray, n: int | np.ndarray, *, seed: int, epochs: np.ndarray) -> np.ndarray:
    """The inverse of `permute`: the position of each window in its epoch, int64 [k]."""
    return shuffle(windows, n, shuffle_keys(_ORDER, seed, epochs), inverse=True)


def first_windows(shard_tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Number the windows of a split through its shards.

    Args:
        shard_tokens: int64 [shards], tokens of each shard.
        seq_len: T; a window is T + 1 tokens at stride T, a shard's tail of under T tokens has none.

    Returns:
        int64 [shards + 1]: the first window of each shard, then n, their number.
    """
    counts = np.maximum(shard_tokens - 1, 0) // seq_len
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def locate(windows: np.ndarray, first: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where windows lie.

    Args:
        windows: int64 [k].
        first: int64 [shards + 1], from `first_windows`.
        seq_len: T.

    Returns:
        Shard int64 [k], and its first token in that shard int64 [k].
    """
    shards = np.searchsorted(first, windows, side="right") - 1
    return shards, (windows - first[shards]) * seq_len


def step_samples(step: int, global_batch: int) -> tuple[int, int]:
    """First and end sample of a step, counted from 1: [(step - 1) * G, step * G)."""
    return (step - 1) * global_batch, step * global_batch


def share_of(count: int, share: tuple[int, int]) -> range:
    """What data coordinate d of D owns of `count` things: [d*count//D, (d+1)*count//D), possibly none."""
    index, parts = share
    return range(index * count // parts, (index + 1) * count // parts)


def slot_seed(seed: int, step: int, slot: int) -> int:
    """A 63-bit seed for the random numbers of one micro-slot, whoever computes it."""
    return xxhash.xxh3_64_intdigest(struct.pack("<4Q", _RNG, seed & _MASK64, step, slot)) >> 1


def shuffle_keys(domain: int, seed: int, *numbers: np.ndarray) -> np.ndarray:
    """Keys of `shuffle`, mixed from the seed and then from each array of numbers in turn.

    Args:
        domain: Keys of different domains have nothing to do with each other.
        seed: Any integer.
        numbers: Each int64 [k] or [1].

    Returns:
        uint64 [k], or [1] where all are equal.
    """
    keys = np.array([xxhash.xxh3_64_intdigest(struct.pack("<2Q", domain, seed & _MASK64))], np.uint64)
    for values in numbers:
        if len(values) and values[0] == values[-1] and (values == values[0]).all():
            values = values[:1]
        keys = values.astype(np.uint64) * _GOLDEN + keys
        keys = _scramble(keys.copy()) ^ keys
    return keys


def shuffle(
    values: np.ndarray, n: int | np.ndarray, keys: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
    """A bijection of 0..n-1 for every n and key.

    Args:
        values: int64 [k], each in 0..n-1.
        n: At least 1 and below 2^53, one for all or int64 [k].
        keys: uint64 [k] or [1], from `shuffle_keys`.
        inverse: Undo it instead.

    Returns:
        int64 [k], each in 0..n-1.
    """
    sizes = np.asarray(n).astype(np.uint64)  # Compared with int64, both would become floats.
    bits = np.frexp((sizes - _ONE).astype(np.float64))[1].astype(np.uint64)
    result = _feistel(values.astype(np.uint64), bits, keys, inverse=inverse)
    outside = np.flatnonzero(result >= sizes)
    while len(outside):
        walked = _feistel(result[outside], _of(bits, outside), _of(keys, outside), inverse=inverse)
        result[outside] = walked
        outside = outside[walked >= _of(sizes, outside)]
    return result.astype(np.int64)


def _of(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values at places; one value stands for all."""
    return values[places] if values.size > 1 else values


def _feistel(values: np.ndarray, bits: np.ndarray, keys: np.ndarray, *, inverse: bool) -> np.ndarray:
    """A keyed permutation of 0..2^bits-1, bits and keys uint64 [k] or [1]: uint64 [k] -> uint64 [k].

    The halves swap at every round; for odd `bits` their widths swap too and, the number of rounds
    being even, are back in place at the end.
    """
    low_bits = bits >> _ONE
    masks = ((_ONE << (bits - low_bits)) - _ONE, (_ONE << low_bits) - _ONE)
    high, low = values >> low_bits, values & masks[1]
    for i in range(ROUNDS - 1, -1, -1) if inverse else range(ROUNDS):
        round_keys = keys + _ROUND_KEYS[i]
        if inverse:
            high, low = (low ^ _scramble(high + round_keys)) & masks[i % 2], high
        else:
            high, low = low, (high ^ _scramble(low + round_keys)) & masks[i % 2]
    return (high << low_bits) | low


def _scramble(values: np.ndarray) -> np.ndarray:
    """The round function: 32 well-mixed bits of uint64 [k], in place; halves have at most 31."""
    values *= _MIX_1
    values ^= values >> _HALF
    values *= _MIX_2
    values >>= _HALF
    return values
