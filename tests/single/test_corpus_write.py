from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvdlm.corpus.write import DocumentList, Documents, ShardWriter, load, save
from hvdlm.data.entries import TokenizerInfo

EOS = 9
INFO = TokenizerInfo("tokenizer.json", "0" * 64, 1000, EOS)


def documents(lengths: list[int], shard_tokens: int = 1000) -> Documents:
    kept = DocumentList(shard_tokens, EOS, np.dtype(np.uint16))
    kept.add(
        [np.full(n, 10 + i, np.uint16) for i, n in enumerate(lengths)], [3 * n + (n > 20) for n in lengths]
    )
    return kept.take()


def shards(folder: Path, docs: list[Documents], shard_tokens: int) -> list[list[list[int]]]:
    writer = ShardWriter(folder / "val", "val", shard_tokens=shard_tokens, tokenizer=INFO)
    for part in docs:
        writer.add(part)
    writer.flush()
    result = []
    for entry in writer.entries:
        with h5py.File(folder / entry.name) as file:
            tokens, offsets = file["tokens"][:], file["doc_offsets"][:]
        assert len(tokens) <= shard_tokens
        result.append([tokens[a:b].tolist() for a, b in pairwise(offsets)])
    assert sum(entry.text_bytes for entry in writer.entries) == sum(int(d.text_bytes.sum()) for d in docs)
    return result


def test_every_document_ends_with_eos_and_a_long_one_is_cut() -> None:
    kept = documents([3, 0, 25], shard_tokens=11)
    assert kept.lengths.tolist() == [4, 1, 11, 11, 6]
    assert kept.text_bytes.tolist() == [9, 0, 30, 30, 16]
    assert (kept.tokens[np.cumsum(kept.lengths) - 1] == EOS).all()
    assert np.count_nonzero(kept.tokens == 12) == 25


def test_shards_are_filled_in_order_and_cut_between_documents(tmp_path: Path) -> None:
    found = shards(tmp_path, [documents([3, 4]), documents([]), documents([2, 9, 1])], 10)
    assert [[len(d) for d in shard] for shard in found] == [[4, 5], [3], [10], [2]]
    assert [d[0] for shard in found for d in shard] == [10, 11, 10, 11, 12]


def test_batches_do_not_show(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 12, 200)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    kept = documents(lengths)
    ends = np.cumsum(kept.lengths)
    parts = [
        Documents(
            kept.tokens[(ends[i] - kept.lengths[i]) : ends[i]],
            kept.lengths[i : i + 1],
            kept.text_bytes[i : i + 1],
        )
        for i in range(len(lengths))
    ]
    assert shards(tmp_path / "whole", [kept], 50) == shards(tmp_path / "parts", parts, 50)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_shuffled_keeps_every_document_whole() -> None:
    kept = documents(list(range(1, 40)))
    [mixed] = kept.shuffled(seed=1, task=2)
    ends = np.cumsum(mixed.lengths)
    order = [int(mixed.tokens[end - 2]) - 10 for end in ends]
    assert sorted(order) == list(range(39))
    assert order != sorted(order)
    assert mixed.text_bytes.tolist() == [3 * (i + 1) + (i >= 20) for i in order]
    for i, end in zip(order, ends, strict=True):
        assert mixed.tokens[end - i - 2 : end].tolist() == [10 + i] * (i + 1) + [EOS]
    assert order != [int(t) for [other] in [kept.shuffled(seed=1, task=3)] for t in other.lengths - 2]
    assert list(documents([]).shuffled(seed=0, task=0)) == []


@pytest.mark.parametrize("lengths", [[], [3, 1, 4]])
def test_save_and_load(lengths: list[int], tmp_path: Path) -> None:
    kept = documents(lengths)
    save(tmp_path / "val-00000", [kept, kept])
    loaded = load(tmp_path / "val-00000", "<u2")
    for field, array in kept._asdict().items():
        np.testing.assert_array_equal(getattr(loaded, field), np.concatenate([array, array]))
