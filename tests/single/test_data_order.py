from __future__ import annotations

import numpy as np
import pytest

from hvdlm.data.blend import windows_of_samples
from hvdlm.data.order import (
    first_windows,
    locate,
    permute,
    share_of,
    slot_seed,
    step_samples,
    unpermute,
)

EPOCH_3 = np.array([3])
GOLDEN_SMALL = [5, 12, 11, 1, 0, 10, 9, 2, 5, 8]
GOLDEN_LARGE = [604713184102, 168140372591, 868918028637, 697539340796, 149261065495]
GOLDEN_SLOT_SEED = 7041799949473748770


@pytest.mark.parametrize("bits", range(25))
def test_a_permutation_is_a_bijection_and_is_undone(bits: int) -> None:
    """At the sizes where cycle walking goes wrong if it can, in pieces that fit a cache."""
    for n in {2**bits - 1, 2**bits, 2**bits + 1} - {0}:
        seen = np.zeros(n, bool)
        for start in range(0, n, 1 << 16):
            positions = np.arange(start, min(start + (1 << 16), n))
            windows = permute(positions, n, seed=7, epochs=EPOCH_3)
            seen[windows] = True
            if bits < 18:
                assert (unpermute(windows, n, seed=7, epochs=EPOCH_3) == positions).all()
        # n marks from n positions: each was hit exactly once.
        assert seen.all()


def test_every_window_comes_once_an_epoch_and_epochs_differ() -> None:
    n = 1000
    windows = windows_of_samples(np.arange(5 * n), [n], seed=1).reshape(5, n)
    assert (np.sort(windows, axis=1) == np.arange(n)).all()
    equal = (windows[:, None] == windows[None]).mean(axis=2)
    assert (equal[~np.eye(5, dtype=bool)] < 0.02).all()


def test_an_epoch_is_the_same_alone_and_in_a_block_of_epochs() -> None:
    n = 37
    block = windows_of_samples(np.arange(4 * n), [n], seed=5)
    for epoch in range(4):
        alone = permute(np.arange(n), n, seed=5, epochs=np.full(n, epoch))
        assert (block[epoch * n : (epoch + 1) * n] == alone).all()
    shuffled = np.random.default_rng(0).permutation(4 * n)
    assert (windows_of_samples(shuffled, [n], seed=5) == block[shuffled]).all()
    undone = unpermute(block, n, seed=5, epochs=np.arange(4 * n) // n)
    assert (undone == np.arange(4 * n) % n).all()


def test_seed_and_epoch_enter_the_key_separately() -> None:
    n, zero = 10_000, np.arange(10_000)
    one = permute(zero, n, seed=0, epochs=np.array([1]))
    assert (one == permute(zero, n, seed=1, epochs=np.array([0]))).mean() < 0.01
    assert (one == permute(zero, n, seed=-1, epochs=np.array([2]))).mean() < 0.01


@pytest.mark.parametrize("n", [10, 100, 5000])
def test_the_order_is_even(n: int) -> None:
    """Chi-square of which window comes first, and of the step to the next, over many epochs."""
    epochs = 40 * n if n < 1000 else 2000
    samples = np.arange(epochs)[:, None] * n + np.arange(2)
    first, second = windows_of_samples(samples.ravel(), [n], seed=3).reshape(epochs, 2).T
    for values, choices in ((first, n), ((second - first) % n - 1, n - 1)):
        counts = np.bincount(values, minlength=choices)
        expected = epochs / choices
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - (choices - 1)) < 5 * np.sqrt(2 * choices)


def test_the_order_is_the_one_it_always_was() -> None:
    """A run that goes on under another version of hvdlm or numpy must not see samples twice."""
    assert windows_of_samples(np.arange(7, 17), [13], seed=42).tolist() == GOLDEN_SMALL
    assert windows_of_samples(np.arange(5), [10**12], seed=42).tolist() == GOLDEN_LARGE
    assert slot_seed(42, 3, 1) == GOLDEN_SLOT_SEED


@pytest.mark.parametrize("seq_len", [1, 4, 7])
def test_windows_are_found_in_their_shard(seq_len: int) -> None:
    tokens = np.array([0, 1, 3 * seq_len, 3 * seq_len + 1, 1, 20])
    first = first_windows(tokens, seq_len)
    windows = np.arange(first[-1])
    expected = [
        (shard, start)
        for shard, count in enumerate(tokens.tolist())
        for start in range(0, count - seq_len, seq_len)
    ]
    shards, starts = locate(windows, first, seq_len)
    assert list(zip(shards.tolist(), starts.tolist(), strict=True)) == expected


def test_any_number_of_ranks_draws_the_same_samples() -> None:
    global_batch, micro_batch = 96, 4
    slots = global_batch // micro_batch
    whole = windows_of_samples(np.arange(*step_samples(3, global_batch)), [1000], seed=1)
    for ranks in range(1, 97):
        drawn = []
        for rank in range(ranks):
            own = share_of(slots, (rank, ranks))
            start = step_samples(3, global_batch)[0]
            samples = np.arange(start + own.start * micro_batch, start + own.stop * micro_batch)
            drawn.append(windows_of_samples(samples, [1000], seed=1))
        assert (np.concatenate(drawn) == whole).all()


def test_shares_may_be_uneven_and_empty() -> None:
    assert [list(share_of(5, (d, 3))) for d in range(3)] == [[0], [1, 2], [3, 4]]
    assert [len(share_of(2, (d, 5))) for d in range(5)] == [0, 0, 1, 0, 1]


def test_slot_seeds_are_63_bits_and_all_different() -> None:
    seeds = {slot_seed(s, t, j) for s in range(5) for t in range(50) for j in range(10)}
    assert len(seeds) == 2500
    assert min(seeds) >= 0 and max(seeds) < 1 << 63
    assert max(seeds) > 1 << 62
