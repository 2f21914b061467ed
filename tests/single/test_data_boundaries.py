"""Positions of tokens in their documents, against the offsets that HDF5 reads."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from data_sets import EOS, TOKENIZER_BYTES, make_data_set, overwrite, tokenizer_info

from hvdlm.config import UserError
from hvdlm.data import boundaries
from hvdlm.data.blend import windows_of_samples
from hvdlm.data.boundaries import Boundaries
from hvdlm.data.files import OpenFiles
from hvdlm.data.loader import BatchPlan, Loader, evaluation_batches
from hvdlm.data.manifest import Manifest, read_manifest, write_manifest
from hvdlm.data.order import first_windows, locate
from hvdlm.data.shards import write_shard
from hvdlm.data.sources import Source

PLAN = BatchPlan(seq_len=16, global_batch=12, micro_batch=3, seed=3, document_mask=True)


def write_documents(folder: Path, shards: list[list[int]]) -> Manifest:
    """Shards of documents of so many tokens, all of them eos: the ids do not tell where a document ends."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER_BYTES)
    entries = []
    for index, lengths in enumerate(shards):
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.full(offsets[-1], EOS)
        path = folder / f"train-{index:05}.h5"
        entries.append(
            write_shard(path, ids, offsets, split="train", text_bytes=1, tokenizer=tokenizer_info())
        )
    return write_manifest(folder, entries, tokenizer=tokenizer_info())


def open_boundaries(folder: Path, manifest: Manifest, *, seq_len: int) -> Boundaries:
    shards = [(folder, entry) for entry in manifest.split("train")]
    files = OpenFiles([(folder, entry.name, entry.file_bytes) for folder, entry in shards], limit=2)
    return Boundaries(shards, files, seq_len=seq_len)


def naive(path: Path, first: int, seq_len: int) -> list[int]:
    """Position by position; behind the shard's end it counts on from there."""
    with h5py.File(path) as file:
        offsets = [int(offset) for offset in file["doc_offsets"][:]]
    found = []
    for token in range(first, first + seq_len):
        found.append(0 if token == first or token in offsets else found[-1] + 1)
    return found


LENGTHS = {
    "one-token documents": [1] * 70,
    "some of one token": [1, 1, 5, 1, 30, 2, 1, 1, 1, 18],
    "one document": [100],
    "longer than several windows": [3, 75, 2, 90],
    "boundaries at windows": [16, 16, 32, 1, 15],
    "a tail": [50, 1, 1],
}


@pytest.mark.parametrize("page_offsets", [2, 3, 1024])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_positions_are_those_of_the_offsets_on_disk(
    tmp_path: Path, lengths: list[int], page_offsets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundaries, "PAGE_OFFSETS", page_offsets)
    found = open_boundaries(tmp_path, write_documents(tmp_path, [lengths]), seq_len=16)
    path, firsts = tmp_path / "train-00000.h5", range(sum(lengths))
    positions = found.positions([0] * len(firsts), firsts)
    assert positions.dtype == np.int64
    assert positions.tolist() == [naive(path, first, 16) for first in firsts]


def test_a_search_is_short_whatever_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents before a long one: interpolation alone would go through them page by page."""
    lengths = [*np.random.default_rng(0).integers(1, 5, 60_000).tolist(), 4_000_000]
    offsets = np.cumsum(lengths)
    found = open_boundaries(tmp_path, write_documents(tmp_path, [lengths]), seq_len=64)
    reads = []
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: reads.append(at) or whole(fd, views, at))
    for first in np.random.default_rng(1).integers(0, offsets[-2] + 1000, 300).tolist():
        reads.clear()
        starts = found.starts(0, first)
        inside = offsets[(offsets > first) & (offsets < first + 64)] - first
        assert starts.tolist() == [0, *inside.tolist()]
        assert len(reads) <= 2 * 6 + 1  # log2 of 60 pages, every other time; one to go on.


def test_batches_of_training_and_evaluation_carry_positions(tmp_path: Path) -> None:
    shards = [[7, 1, 1, 40, 3, 100, 2], [1, 30, 4], [5] * 60]
    manifest = write_documents(tmp_path, shards)
    first = first_windows(np.array([sum(lengths) for lengths in shards]), 16)
    for prefetch in (0, 2):
        loader = Loader(
            [Source(tmp_path, manifest)], "train", plan=PLAN, share=(0, 1), prefetch_steps=prefetch
        )
        for step in islice(loader.steps(0), 9):
            samples = np.arange(step.first_sample, step.end_sample)
            places = locate(windows_of_samples(samples, loader.windows, seed=3), first, 16)
            expected = [naive(tmp_path / f"train-{s:05}.h5", f, 16) for s, f in zip(*places, strict=True)]
            assert torch.cat([slot.batch["positions"] for slot in step.slots]).tolist() == expected
            assert step.label_count == 12 * 16  # The last token of a document has a label as any other.
        loader.close()
    batches = list(
        evaluation_batches([Source(tmp_path, manifest)], "train", plan=PLAN, share=(0, 1), limit_batches=0)
    )
    firsts = [(s, f) for s, lengths in enumerate(shards) for f in range(0, sum(lengths) - 1, 16)]
    expected = [naive(tmp_path / f"train-{s:05}.h5", f, 16) for s, f in firsts]
    assert torch.cat([batch["positions"] for batch in batches]).tolist() == expected
    assert batches[0]["positions"].dtype == torch.int64


def test_without_the_mask_batches_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Boundaries, "positions")
    manifest, _ = make_data_set(tmp_path, {"train-00000": 400})
    plan = BatchPlan(16, 4, 2, 0)
    steps = Loader([Source(tmp_path, manifest)], "train", plan=plan, share=(0, 1), prefetch_steps=0).steps(0)
    evaluation = evaluation_batches(
        [Source(tmp_path, manifest)], "train", plan=plan, share=(0, 1), limit_batches=1
    )
    for batch in (next(steps).slots[0].batch, next(evaluation)):
        assert batch.keys() == {"tokens", "labels"}


DAMAGE = {
    "not from 0": (0, 1),
    "falls": (3, 10),
    "stands still": (3, 100),
    "beyond the shard": (2, 10**9),
    "negative as a signed number": (2, 2**64 - 1),
    "ends early": (8, 399),
    "ends late": (8, 401),
}


@pytest.mark.parametrize(("index", "value"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_offsets_are_named_with_the_cure(tmp_path: Path, index: int, value: int) -> None:
    manifest, _ = make_data_set(tmp_path, {"train-00000": 400})
    extent = manifest.shards[0].extents.doc_offsets
    path = tmp_path / "train-00000.h5"
    overwrite(path, extent.offset + 8 * index, value.to_bytes(8, "little"))
    loader = Loader(
        [Source(tmp_path, read_manifest(tmp_path))], "train", plan=PLAN, share=(0, 1), prefetch_steps=0
    )
    cure = rf"run python -m hvdlm.dataset repair {tmp_path}, "
    with pytest.raises(UserError, match=rf"{path}: its doc_offsets do not rise from 0 to 400: .*{cure}"):
        next(loader.steps(0))


def test_offsets_that_rise_beyond_what_documents_allow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in any page, also where nothing else is wrong with it."""
    monkeypatch.setattr(boundaries, "PAGE_OFFSETS", 4)
    manifest = write_documents(tmp_path, [[1] * 70])
    extent, found = manifest.shards[0].extents.doc_offsets, open_boundaries(tmp_path, manifest, seq_len=2)
    for wrong in (np.arange(31, 61), np.arange(29, 59)):
        overwrite(tmp_path / "train-00000.h5", extent.offset + 8 * 30, wrong.tobytes())
        with pytest.raises(UserError, match="doc_offsets do not rise"):
            found.positions([0], [45])


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_makes_it_hang_or_fall(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bytes are, a window is found or the file is named."""
    monkeypatch.setattr(boundaries, "PAGE_OFFSETS", 4)
    manifest = write_documents(tmp_path, [[3] * 200])
    rng = np.random.default_rng(seed)
    wrong = np.arange(0, 603, 3) + rng.integers(-3, 4, 201) * (rng.random(201) < 0.1)
    overwrite(tmp_path / "train-00000.h5", manifest.shards[0].extents.doc_offsets.offset, wrong.tobytes())
    found = open_boundaries(tmp_path, manifest, seq_len=16)
    named = 0
    for first in range(580):
        try:
            positions = found.positions([0], [first])
            assert positions.shape == (1, 16) and positions.min() == 0 and positions.max() < 16
        except UserError:
            named += 1
    assert named
