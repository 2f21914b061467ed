"""Blends: exact at block edges, every source as if it were alone, the same on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set

from hvdlm.config import UserError
from hvdlm.data import manifest as manifests
from hvdlm.data.blend import ALONE, Blend, draws_before, draws_of_samples, windows_of_samples
from hvdlm.data.loader import BatchPlan, Loader, StepBatch, evaluation_batches
from hvdlm.data.order import share_of, step_samples
from hvdlm.data.sources import Source, read_sources

WEIGHTS = [(1, 1), (3, 1), (1, 4095), (5, 3, 2), (7, 7, 7), (1, 2, 3, 4, 5, 999), tuple(range(60, 160))]
PLAN = BatchPlan(seq_len=16, global_batch=12, micro_batch=2, seed=3)
GOLDEN = [6, 4, 0, 9, 5, 2, 6, 13, 0, 7, 8, 2]


def blend_of(*weights: int) -> Blend:
    return Blend(weights, (0,) * len(weights))


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: str(weights[:6]))
def test_draws_are_exact_at_every_block_edge(weights: tuple[int, ...]) -> None:
    blend, total = blend_of(*weights), sum(weights)
    blocks = 25
    sources, draws = draws_of_samples(np.arange(blocks * 4096), blend, seed=1)
    for block in range(blocks + 1):
        counts = np.bincount(sources[: block * 4096], minlength=len(weights)).tolist()
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(block * 4096 * weight, total)) < 1
        assert draws_before(block * 4096, blend, seed=1) == tuple(counts)
    # The draws of a source come in order, without a gap, everywhere and not only at edges.
    for source in range(len(weights)):
        own = draws[sources == source]
        assert (own == np.arange(len(own))).all()


def test_draws_are_exact_far_from_the_beginning() -> None:
    """Where 64 bits would not hold the product of sample and weight."""
    blend, block = blend_of(2**30, 2**30 - 7, 3 * 2**20), 10**10
    before = [draws_before(block * 4096, blend, seed=1)[k] for k in range(3)]
    total = sum(blend.weights)
    assert sum(before) == block * 4096
    exact = [Fraction(block * 4096 * weight, total) for weight in blend.weights]
    assert all(abs(found - wanted) < 1 for found, wanted in zip(before, exact, strict=True))
    sources, draws = draws_of_samples(np.arange(block * 4096, block * 4096 + 10), blend, seed=1)
    assert all(draw >= before[source] for source, draw in zip(sources, draws, strict=True))


def test_a_block_is_mixed_and_blocks_differ() -> None:
    sources, _ = draws_of_samples(np.arange(4 * 4096), blend_of(1, 1), seed=1)
    for block in sources.reshape(4, 4096):
        assert abs((block[1:] == block[:-1]).mean() - 0.5) < 0.05
    assert not (sources[:4096] == sources[4096:8192]).all()
    assert not (sources == draws_of_samples(np.arange(4 * 4096), blend_of(1, 1), seed=2)[0]).all()


def test_each_source_comes_once_an_epoch_in_its_own_order() -> None:
    counts, weights = [1000, 37, 4096], (5, 1, 2)
    samples = np.arange(40 * 4096 + 123)
    windows = windows_of_samples(samples, counts, seed=9, blend=blend_of(*weights))
    first = 0
    for n in counts:
        own = windows[(windows >= first) & (windows < first + n)] - first
        assert len(own) > 5 * n
        assert (own == windows_of_samples(np.arange(len(own)), [n], seed=9)).all()
        for epoch in range(len(own) // n):
            assert (np.bincount(own[epoch * n : (epoch + 1) * n], minlength=n) == 1).all()
        first += n


def test_any_samples_in_any_order_are_the_same_samples() -> None:
    blend, counts = blend_of(2, 3), [50, 60_000]
    whole = windows_of_samples(np.arange(50_000), counts, seed=1, blend=blend)
    chosen = np.random.default_rng(0).integers(0, 50_000, 7000)
    assert (windows_of_samples(chosen, counts, seed=1, blend=blend) == whole[chosen]).all()
    assert len(windows_of_samples(chosen[:0], counts, seed=1, blend=blend)) == 0


def test_any_number_of_ranks_draws_the_same_samples() -> None:
    global_batch, micro_batch, blend, counts = 96, 4, blend_of(3, 1, 1), [1000, 70, 999]
    slots, start = global_batch // micro_batch, step_samples(43, global_batch)[0]
    whole = windows_of_samples(np.arange(start, start + global_batch), counts, seed=1, blend=blend)
    for ranks in range(1, 97):
        drawn = []
        for rank in range(ranks):
            own = share_of(slots, (rank, ranks))
            samples = np.arange(start + own.start * micro_batch, start + own.stop * micro_batch)
            drawn.append(windows_of_samples(samples, counts, seed=1, blend=blend))
        assert (np.concatenate(drawn) == whole).all()


def test_the_blend_is_the_one_it_always_was() -> None:
    found = windows_of_samples(np.arange(4090, 4102), [10, 7], seed=42, blend=blend_of(2, 1))
    assert found.tolist() == GOLDEN


def test_a_blend_of_one_source_is_the_source() -> None:
    samples = np.arange(100, 20_000)
    alone = windows_of_samples(samples, [777], seed=4)
    for weight in (1, 5):
        assert (windows_of_samples(samples, [777], seed=4, blend=blend_of(weight)) == alone).all()
    later = Blend((1,), (300,), first_sample=100)
    assert (windows_of_samples(samples - 200, [777], seed=4)[200:] == alone[:-200]).all()
    assert (windows_of_samples(samples, [777], seed=4, blend=later)[:-200] == alone[200:]).all()
    assert Blend((1,), (0,)) == ALONE


@pytest.mark.parametrize("change", [1, 4095, 4096, 4097, 10_000])
def test_a_new_stage_repeats_and_loses_nothing(change: int) -> None:
    """Whatever the sample at which the weights change."""
    counts, first = [3000, 5000], blend_of(3, 1)
    second = Blend((1, 2), draws_before(change, first, seed=6), change)
    sources, draws = draws_of_samples(np.arange(change), first, seed=6)
    more_sources, more_draws = draws_of_samples(np.arange(change, 30_000), second, seed=6)
    for source in range(2):
        own = np.concatenate([draws[sources == source], more_draws[more_sources == source]])
        assert (own == np.arange(len(own))).all()
    both = np.concatenate(
        [
            windows_of_samples(np.arange(change), counts, seed=6, blend=first),
            windows_of_samples(np.arange(change, 30_000), counts, seed=6, blend=second),
        ]
    )
    own = both[both < 3000][:3000]
    assert len(np.unique(own)) == 3000
    share = (more_sources[: 4096 * 3] == 1).sum()
    assert abs(share - 4096 * 2) < 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("blend")
    sizes = {"a": {"train-00000": 900, "train-00001": 333, "val-00000": 203}}
    sizes["b"] = {"train-00000": 17, "train-00001": 2050, "val-00000": 99, "val-00001": 55}
    for name, shards in sizes.items():
        make_data_set(folder / name, shards)
    return read_sources([str(folder / "a"), str(folder / "b")])


def take(loader: Loader, start_step: int, count: int) -> list[StepBatch]:
    steps = list(islice(loader.steps(start_step), count))
    loader.close()
    return steps


def rows(batches: list[StepBatch]) -> torch.Tensor:
    return torch.cat([slot.batch["tokens"] for batch in batches for slot in batch.slots])


@pytest.mark.parametrize("shuffle_mb", [0, 1])
def test_the_loader_reads_what_the_blend_says(sources: list[Source], shuffle_mb: int) -> None:
    plan, blend = replace(PLAN, shuffle_mb=shuffle_mb), blend_of(2, 1)
    loader = Loader(sources, "train", blend=blend, plan=plan, share=(0, 1), prefetch_steps=2)
    assert loader.windows == [56 + 20, 1 + 128]
    found = rows(take(loader, 0, 60))
    drawn, _ = draws_of_samples(np.arange(720), blend, seed=3)
    for index, source in enumerate(sources):
        alone = Loader([source], "train", plan=plan, share=(0, 1), prefetch_steps=0)
        own = found[drawn == index]
        assert torch.equal(own, rows(take(alone, 0, 60))[: len(own)])
    for parts in (2, 5, 7):
        shares = [
            take(Loader(sources, "train", blend=blend, plan=plan, share=(d, parts), prefetch_steps=1), 9, 3)
            for d in range(parts)
        ]
        together = [rows([share[step] for share in shares if share[step].slots]) for step in range(3)]
        assert torch.equal(torch.cat(together), found[9 * 12 : 12 * 12])


def test_validation_is_that_of_all_sources_in_their_order(sources: list[Source]) -> None:
    def tokens(some: list[Source], limit: int) -> torch.Tensor:
        batches = evaluation_batches(some, "val", plan=PLAN, share=(0, 1), limit_batches=limit)
        return torch.cat([batch["tokens"] for batch in batches])

    both = tokens(sources, 0)
    assert torch.equal(both, torch.cat([tokens([source], 0) for source in sources]))
    fixed = tokens(sources, 1)
    assert len(fixed) == 12
    assert torch.equal(tokens(sources, 100)[:12], fixed)


def test_a_source_without_a_window_is_named(sources: list[Source], tmp_path: Path) -> None:
    manifest, _ = make_data_set(tmp_path, {"train-00000": 16})
    with pytest.raises(UserError, match=rf"{tmp_path}: split 'train' has no sample"):
        Loader(
            [sources[0], Source(tmp_path, manifest)],
            "train",
            blend=blend_of(1, 1),
            plan=PLAN,
            share=(0, 1),
            prefetch_steps=0,
        )


def test_what_cannot_be_blended_is_refused(sources: list[Source], tmp_path: Path) -> None:
    one = str(sources[0].folder)
    with pytest.raises(UserError, match=r"holds the same tokens as .*; name one of them in data.path"):
        read_sources([one, f"{one}/../a"])
    make_data_set(tmp_path, {"train-00000": 500})
    manifest = manifests.read_manifest(tmp_path)
    changes = (
        ({"sha256": "5" * 64}, rf"tokenizer 555555555555, {one} with \w+, and .*--tokenizer {one}/tokenizer"),
        ({"vocab_size": 301}, rf"ends documents with id 0 of 301, {one} with 0 of 300"),
    )
    for change, message in changes:
        changed = replace(manifest, tokenizer=replace(manifest.tokenizer, **change))
        (tmp_path / "manifest.json").write_text(changed.to_json())
        with pytest.raises(UserError, match=message) as caught:
            read_sources([one, str(tmp_path)])
        assert str(tmp_path) in str(caught.value)
        assert caught.value.exit_code == 2
