"""The windowed shuffle: a bijection whatever the sizes, and near on disk."""

from __future__ import annotations

import itertools
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set

from hvdlm.data.blend import windows_of_samples
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.locality import Chunks, chunks_within, permute_near, unpermute_near
from hvdlm.data.order import first_windows, locate
from hvdlm.data.sources import Source

EPOCH_3 = np.array([3])
GOLDEN = [15, 8, 9, 62, 60, 63, 61, 58, 56, 59]


def assert_bijection(n: int, chunks: Chunks) -> None:
    positions = np.arange(n)
    windows = permute_near(positions, n, chunks, seed=7, epochs=EPOCH_3)
    assert (np.bincount(windows, minlength=n) == 1).all() and len(windows) == n
    assert (unpermute_near(windows, n, chunks, seed=7, epochs=EPOCH_3) == positions).all()


@pytest.mark.parametrize("chunks", [Chunks(1, 1), Chunks(1, 5), Chunks(7, 1), Chunks(8, 3), Chunks(100, 4)])
def test_it_is_a_bijection_and_is_undone(chunks: Chunks) -> None:
    for bits in range(1, 15):
        for n in (2**bits - 1, 2**bits, 2**bits + 1):
            assert_bijection(n, chunks)


def test_it_is_a_bijection_at_every_edge_of_chunk_and_group() -> None:
    for windows, group in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        for n in range(1, 4 * windows * group + 2):
            assert_bijection(n, Chunks(windows, group))


def test_epochs_and_sizes_mixed_in_one_call_are_as_alone() -> None:
    chunks, rng = Chunks(4, 3), np.random.default_rng(0)
    n = rng.integers(1, 200, 5000)
    positions, epochs = rng.integers(0, n), rng.integers(0, 5, 5000)
    mixed = permute_near(positions, n, chunks, seed=1, epochs=epochs)
    for k in range(0, 5000, 50):
        one = permute_near(positions[k : k + 1], int(n[k]), chunks, seed=1, epochs=epochs[k : k + 1])
        assert one[0] == mixed[k]
    assert (unpermute_near(mixed, n, chunks, seed=1, epochs=epochs) == positions).all()


@pytest.mark.parametrize("n", [10_000, 10_003, 9_984])
def test_a_group_is_a_few_whole_chunks(n: int) -> None:
    chunks = Chunks(16, 8)
    windows = permute_near(np.arange(n), n, chunks, seed=1, epochs=EPOCH_3)
    touched = [len(np.unique(windows[i : i + 32] // 16)) for i in range(0, n - 32, 32)]
    assert max(touched) <= 16
    whole = permute_near(np.arange(n), n, Chunks(16, 10_000), seed=1, epochs=EPOCH_3)
    assert len(np.unique(whole[:32] // 16)) > 25
    first = np.sort(windows[:112] // 16)
    assert len(np.unique(first)) <= 8
    # Mixed inside, and the chunks themselves in no order.
    assert (np.diff(windows) == 1).mean() < 0.1
    assert len(np.unique(np.diff(np.unique(first)))) > 2


def test_epochs_and_seeds_differ() -> None:
    chunks, at = Chunks(16, 8), np.arange(10_000)
    orders = [
        permute_near(at, 10_000, chunks, seed=seed, epochs=np.array([epoch]))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.02
    groups = [permute_near(at[:128], 10_000, chunks, seed=seed, epochs=EPOCH_3) % 16 for seed in (0, 1)]
    assert (groups[0] == groups[1]).mean() < 0.3


def test_the_order_is_the_one_it_always_was() -> None:
    found = permute_near(np.arange(45, 55), 99, Chunks(8, 1), seed=42, epochs=np.array([1]))
    assert found.tolist() == GOLDEN


def test_chunks_are_about_four_mib() -> None:
    assert chunks_within(0, 4096) is None
    assert chunks_within(64, 4096) == Chunks(1024, 16)
    assert chunks_within(1, 4096) == Chunks(1024, 1)
    assert chunks_within(64, 5 << 20) == Chunks(1, 12)


def test_any_number_of_ranks_draws_the_same_samples() -> None:
    chunks, counts = Chunks(8, 4), [1000]
    whole = windows_of_samples(np.arange(5000), counts, seed=1, chunks=chunks)
    for ranks in range(1, 97):
        parts = [np.arange(rank, 5000, ranks) for rank in range(ranks)]
        for part in parts:
            assert (windows_of_samples(part, counts, seed=1, chunks=chunks) == whole[part]).all()


def test_the_loader_follows_and_announces_each_chunk_once_and_only_in_this_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm.data.locality.CHUNK_BYTES", 16 * 2 * 32)
    manifest, ids = make_data_set(tmp_path, {"train-00000": 200_000, "train-00001": 77_777})
    hints: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, advice: hints.append((offset, size)))
    for shuffle_mb in (0, 1):
        plan = BatchPlan(16, 8, 8, seed=1, shuffle_mb=shuffle_mb)
        loader = Loader([Source(tmp_path, manifest)], "train", plan=plan, share=(0, 1), prefetch_steps=0)
        steps = loader.windows[0] // 8
        batches = list(islice(loader.steps(0), steps + 1))
        order = windows_of_samples(
            np.arange(80), loader.windows, seed=1, chunks=Chunks(32, 1024) if shuffle_mb else None
        )
        shards, starts = locate(order, first_windows(np.array([200_000, 77_777]), 16), 16)
        read = torch.cat([slot.batch["tokens"] for batch in batches[:10] for slot in batch.slots])
        for row, shard, start in zip(read.tolist(), shards.tolist(), starts.tolist(), strict=True):
            assert row == ids[f"train-{shard:05}.h5"][start : start + 16].tolist()
        assert len(hints) == shuffle_mb * (-(-loader.windows[0] // 32) + 1)  # One chunk lies in two shards.
    # Windows overlap by a token; the tail of a shard is no window.
    assert sum(size for _, size in hints) == 2 * (loader.windows[0] * 16 + len(hints))
