from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_sets import flip_bit, make_data_set, overwrite

from hvdlm.config import UserError
from hvdlm.data.blend import windows_of_samples
from hvdlm.data.loader import BatchPlan, Loader, StepBatch, evaluation_batches
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.order import first_windows, locate, slot_seed
from hvdlm.data.prefetch import Prefetcher
from hvdlm.data.sources import Source
from hvdlm.data.windows import Recycler

SIZES = {"train-00000": 1000, "train-00001": 37, "train-00002": 5, "train-00003": 641, "val-00000": 203}
PLAN = BatchPlan(seq_len=16, global_batch=12, micro_batch=2, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("data")
    return folder, *make_data_set(folder, SIZES)


def take(loader: Loader, start_step: int, count: int) -> list[StepBatch]:
    steps = list(islice(loader.steps(start_step), count))
    loader.close()
    return steps


def rows(batches: list[StepBatch]) -> torch.Tensor:
    return torch.cat([slot.batch["tokens"] for batch in batches for slot in batch.slots])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_step_holds_the_windows_of_its_samples(data: tuple) -> None:
    folder, manifest, tokens = data
    names = [entry.name for entry in manifest.split("train")]
    first = first_windows(np.array([len(tokens[name]) for name in names]), 16)
    loader = Loader([Source(folder, manifest)], "train", plan=PLAN, share=(0, 1), prefetch_steps=3)
    assert loader.windows == [62 + 2 + 0 + 40]
    for step, batch in zip(range(1, 30), take(loader, 0, 29), strict=True):
        assert (batch.step, batch.first_sample, batch.end_sample) == (step, 12 * step - 12, 12 * step)
        assert batch.label_count == 12 * 16
        assert [slot.index for slot in batch.slots] == list(range(6))
        samples = np.arange(batch.first_sample, batch.end_sample)
        shards, starts = locate(windows_of_samples(samples, loader.windows, seed=3), first, 16)
        for slot, at in zip(batch.slots, range(0, 12, 2), strict=True):
            assert slot.rng_seed == slot_seed(3, step, slot.index)
            for row in range(2):
                window = tokens[names[shards[at + row]]][starts[at + row] :][:17]
                assert slot.batch["tokens"][row].tolist() == window[:-1].tolist()
                assert slot.batch["labels"][row].tolist() == window[1:].tolist()


def test_batches_are_int64_views_of_one_buffer(data: tuple) -> None:
    loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=1)
    batch = take(loader, 0, 1)[0].slots[0].batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {tensor.shape for tensor in batch.values()} == {(2, 16)}
    assert batch["labels"].data_ptr() == batch["tokens"].data_ptr() + 8


@pytest.mark.parametrize("parts", [2, 3, 4, 7, 13])
def test_any_shares_together_are_the_whole(data: tuple, parts: int) -> None:
    whole = rows(take(Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=2), 0, 4))
    shares = [
        take(Loader([Source(*data[:2])], "train", plan=PLAN, share=(d, parts), prefetch_steps=2), 0, 4)
        for d in range(parts)
    ]
    assert parts <= 6 or any(not share[0].slots for share in shares)
    together = [rows([share[step] for share in shares if share[step].slots]) for step in range(4)]
    assert torch.equal(torch.cat(together), whole)
    assert [batch.step for batch in shares[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize("start", [0, 1, 5, 8, 9, 23, 1000])
def test_it_goes_on_at_any_step_on_any_number_of_ranks(data: tuple, start: int) -> None:
    """104 windows and 12 a step: epochs end inside steps."""
    loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=4)
    whole = rows(take(loader, 0, start + 3)[start:]) if start < 1000 else rows(take(loader, 999, 4)[1:])
    halves = [
        Loader([Source(*data[:2])], "train", plan=PLAN, share=(d, 2), prefetch_steps=1) for d in range(2)
    ]
    parts = [take(half, start, 3) for half in halves]
    assert torch.equal(torch.cat([rows([a, b]) for a, b in zip(*parts, strict=True)]), whole)


def test_batches_kept_by_the_consumer_are_never_overwritten(data: tuple) -> None:
    loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=2)
    steps = loader.steps(0)
    kept = [next(steps) for _ in range(3)]
    copies = [rows([batch]) for batch in kept]
    one_view = kept[0].slots[1].batch["labels"][1, 3:]
    copy_of_view = one_view.clone()
    del kept[0]
    for _ in range(30):
        next(steps)
    loader.close()
    assert torch.equal(one_view, copy_of_view)
    assert all(torch.equal(rows([batch]), copy) for batch, copy in zip(kept, copies[1:], strict=True))


def test_memory_is_recycled_only_when_nothing_refers_to_it() -> None:
    recycler = Recycler((2, 4), limit=2)
    first = recycler.take()
    view = torch.from_numpy(first[1])[1:]
    address = first.ctypes.data
    del first
    assert recycler.take().ctypes.data != address
    del view
    assert recycler.take().ctypes.data == address


def test_without_prefetch_there_is_no_thread_and_the_same_batches(data: tuple) -> None:
    before = threading.active_count()
    loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=0)
    steps = loader.steps(3)
    own = [next(steps) for _ in range(4)]
    assert threading.active_count() == before
    threaded = take(Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=4), 3, 4)
    assert torch.equal(rows(own), rows(threaded))


def test_memory_does_not_grow(data: tuple) -> None:
    """A hundred thousand windows: a leak of one small object for each would be megabytes."""
    plan = BatchPlan(seq_len=16, global_batch=100, micro_batch=100, seed=0)
    steps = Loader([Source(*data[:2])], "train", plan=plan, share=(0, 1), prefetch_steps=0).steps(0)
    for _ in range(500):
        next(steps)
    before = psutil.Process().memory_info().rss
    for _ in range(1000):
        next(steps)
    assert psutil.Process().memory_info().rss - before < 2**20


def test_files_kept_open_are_few_and_all_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.data.loader.MAX_OPEN_FILES", 6)
    make_data_set(tmp_path, {f"train-{i:05}": 60 for i in range(40)})
    before = open_files()
    loader = Loader(
        [Source(tmp_path, read_manifest(tmp_path))], "train", plan=PLAN, share=(0, 1), prefetch_steps=2
    )
    steps = loader.steps(0)
    for _ in range(50):
        next(steps)
        assert open_files() <= before + 6
    loader.close()
    assert open_files() == before


def test_a_window_is_read_once_however_few_files_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm.data.loader.MAX_OPEN_FILES", 30)
    make_data_set(tmp_path, {f"train-{i:05}": 60 for i in range(40)})
    whole, reads = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *call: reads.append(call) or whole(*call))
    loader = Loader(
        [Source(tmp_path, read_manifest(tmp_path))], "train", plan=PLAN, share=(0, 1), prefetch_steps=0
    )
    assert len(rows(take(loader, 0, 50))) == len(reads) == 50 * PLAN.global_batch


def test_closing_ends_the_threads_at_any_moment(data: tuple) -> None:
    before = threading.active_count()
    for taken in (0, 1, 7):
        loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=4)
        steps = loader.steps(0)
        for _ in range(taken):
            next(steps)
        loader.close()
        assert threading.active_count() == before
        assert next(steps, None) is None
    loader.close()


def test_a_second_iteration_ends_the_first(data: tuple) -> None:
    loader = Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=2)
    first = loader.steps(0)
    next(first)
    assert next(loader.steps(4)).step == 5
    assert next(first, None) is None
    loader.close()


def test_an_exception_in_a_thread_reaches_the_consumer_with_its_traceback() -> None:
    def explode(index: int) -> Iterator[int]:
        yield index
        raise RuntimeError("deep inside")

    items = Prefetcher(explode, threads=2, depth=4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(RuntimeError, match="deep inside") as caught:
        next(items)
    assert "explode" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert next(items, None) is None


def test_it_reads_ahead_and_no_further() -> None:
    made = []

    def count(index: int) -> Iterator[int]:
        for item in range(index, 1000, 2):
            made.append(item)
            yield item

    items = Prefetcher(count, threads=2, depth=4)
    assert next(items) == 0
    for _ in range(100):
        if len(made) == 7:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)
    assert len(made) == 7  # One consumed, four ready, one in each thread's hands.
    items.close()


def build(folder: Path) -> Loader:
    return Loader([Source(folder, read_manifest(folder))], "train", plan=PLAN, share=(0, 1), prefetch_steps=2)


def read_all(folder: Path) -> None:
    loader = build(folder)
    try:
        list(islice(loader.steps(0), 20))
    finally:
        loader.close()


def test_a_missing_or_changed_shard_is_refused_before_training(tmp_path: Path) -> None:
    make_data_set(tmp_path, SIZES)
    path = tmp_path / "train-00001.h5"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    cure = rf"run python -m hvdlm.dataset repair {tmp_path}, "
    with pytest.raises(UserError, match=rf"train-00001.h5: has {size - 1} bytes, .* says {size}: .*{cure}"):
        build(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"train-00001.h5: missing, .*{cure}"):
        build(tmp_path)
    path.mkdir()
    with pytest.raises(UserError, match=r"train-00001.h5: not a regular file"):
        build(tmp_path)


def test_a_shard_that_shrinks_or_vanishes_during_training_is_named(tmp_path: Path) -> None:
    make_data_set(tmp_path, {"train-00000": 300_000})
    path = tmp_path / "train-00000.h5"
    loader = build(tmp_path)
    steps = loader.steps(0)
    for _ in range(2):  # Each of the two threads has opened the file.
        next(steps)
    os.truncate(path, 1 << 20)
    with pytest.raises(UserError, match=r"train-00000.h5: truncated: ends at byte \d+, needed \d+; run"):
        list(islice(steps, 50))
    loader.close()
    with pytest.raises(UserError, match=r"train-00000.h5: has 1048576 bytes"):
        next(loader.steps(0))
    loader.close()


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    manifest, _ = make_data_set(tmp_path, {"train-00000": 2000})
    extent = manifest.shards[0].extents.tokens
    overwrite(tmp_path / "train-00000.h5", extent.offset + 2 * 777, b"\xff\xff")
    with pytest.raises(
        UserError, match=r"train-00000.h5: token 777 has id 65535, .* end at 299: damaged; run"
    ):
        read_all(tmp_path)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_device_error_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int) -> None:
    make_data_set(tmp_path, {"train-00000": 2000})
    steps = build(tmp_path).steps(0)
    for _ in range(steps_before):
        next(steps)

    def broken(fd: int, views: list, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(
        UserError, match=r"train-00000.h5: cannot be read at byte \d+: Input/output error"
    ) as caught:
        for _ in range(9):
            next(steps)
    assert caught.value.exit_code == 1


def test_short_reads_go_on(data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(
        take(Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=1), 0, 3)
    )
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    found = rows(take(Loader([Source(*data[:2])], "train", plan=PLAN, share=(0, 1), prefetch_steps=1), 0, 3))
    assert torch.equal(found, expected)


def test_without_a_window_there_is_no_loader(data: tuple) -> None:
    folder, manifest, _ = data
    plan = BatchPlan(seq_len=1000, global_batch=2, micro_batch=2, seed=0)
    with pytest.raises(
        UserError, match=r"'train' has no sample: .* has 1000 tokens, a sample needs 1001"
    ) as caught:
        Loader([Source(folder, manifest)], "train", plan=plan, share=(0, 1), prefetch_steps=1)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"multiple of train.micro_batch \(5\)"):
        Loader(
            [Source(folder, manifest)], "train", plan=BatchPlan(8, 12, 5, 0), share=(0, 1), prefetch_steps=1
        )
    with pytest.raises(UserError, match="has no sample"):
        next(
            evaluation_batches(
                [Source(folder, manifest)], "no such", plan=PLAN, share=(0, 1), limit_batches=0
            )
        )


def evaluate(data: tuple, split: str, share: tuple[int, int], limit: int) -> list[dict[str, torch.Tensor]]:
    return list(
        evaluation_batches(
            [Source(*data[:2])], split, plan=BatchPlan(16, 1, 3, 0), share=share, limit_batches=limit
        )
    )


@pytest.mark.parametrize("limit", [0, 1, 10, 50, 10_000])
def test_evaluation_uses_each_sample_once_whatever_the_ranks(data: tuple, limit: int) -> None:
    whole = evaluate(data, "train", (0, 1), limit)
    expected = torch.cat([batch["tokens"] for batch in whole])
    assert len(expected) == {0: 63 + 3 + 1 + 40, 10_000: 104}.get(limit, limit)
    assert all(len(batch["tokens"]) == 3 for batch in whole[:-1])
    for parts in (2, 3, 5, 60):
        batches = [batch for d in range(parts) for batch in evaluate(data, "train", (d, parts), limit)]
        # The same batches too: how a loss rounds depends on what is summed with it.
        assert [len(batch["tokens"]) for batch in batches] == [len(batch["tokens"]) for batch in whole]
        assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), expected)


def test_the_whole_split_predicts_every_token_but_each_shards_first_once(data: tuple) -> None:
    _, manifest, tokens = data
    for split in ("train", "val"):
        batches = evaluate(data, split, (0, 1), 0)
        inputs = torch.cat([batch["tokens"].flatten() for batch in batches])
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        counted = labels != -100
        ids = [torch.from_numpy(tokens[entry.name]) for entry in manifest.split(split)]
        assert torch.equal(labels[counted], torch.cat([shard[1:] for shard in ids]))
        assert torch.equal(inputs[counted], torch.cat([shard[:-1] for shard in ids]))
        assert not inputs[~counted].any()


def test_what_memory_held_before_is_no_bad_id(data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short window leaves most of its row unread."""
    whole = np.empty

    def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = whole(shape, dtype)
        array.fill(np.iinfo(dtype).max)
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    batches = len(evaluate(data, "train", (0, 1), 0))
    # Each batch the first of its reader: none finds the ids of another.
    assert all(evaluate(data, "train", (d, batches), 0) for d in range(batches))


def test_the_evaluation_set_is_fixed_and_shuffled(data: tuple) -> None:
    few = torch.cat([batch["tokens"] for batch in evaluate(data, "train", (0, 1), 20)])
    more = torch.cat([batch["tokens"] for batch in evaluate(data, "train", (0, 1), 60)])
    assert torch.equal(more[:20], few)
    in_order = torch.cat([batch["tokens"] for batch in evaluate(data, "train", (0, 1), 0)])
    assert not torch.equal(in_order[:20], few)


def test_a_flipped_bit_that_stays_in_the_vocabulary_is_not_noticed_by_reading(tmp_path: Path) -> None:
    """Why verification exists: reading alone cannot tell."""
    manifest, _ = make_data_set(tmp_path, {"train-00000": 2000})
    flip_bit(tmp_path / "train-00000.h5", manifest.shards[0].extents.tokens.offset + 100)
    read_all(tmp_path)
