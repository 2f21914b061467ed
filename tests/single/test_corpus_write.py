from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvdlm.corpus import piles, write
from hvdlm.corpus.encode import shuffled
from hvdlm.corpus.piles import Pile, PileWriter, remove, save_in_order
from hvdlm.corpus.write import ShardWriter
from hvdlm.data.entries import TokenizerInfo

EOS, U2 = 9, np.dtype(np.uint16)
INFO = TokenizerInfo("tokenizer.json", "0" * 64, 1000, EOS)


def pile(stem: Path, lengths: list[int], limit: int = 999) -> Pile:
    """Documents of these lengths without eos; document i is made of id 10 + i."""
    with PileWriter(stem, eos_id=EOS, dtype=U2, limit=limit) as writer:
        for i, n in enumerate(lengths):
            # In pieces, as a long text comes.
            for part in np.array_split(np.full(n, 10 + i, np.uint16), 1 + i % 3):
                writer.add(part)
            writer.end(3 * n + (n > 20))
        writer.flush()
    return Pile(stem, U2)


def tokens_of(found: Pile) -> np.ndarray:
    out = np.empty(int(found.lengths.sum()), U2)
    found.copy(np.arange(len(found.lengths)), out)
    return out


def shards(folder: Path, piles: list[tuple[Pile, np.ndarray]], shard_tokens: int) -> list[list[list[int]]]:
    writer = ShardWriter(folder / "val", "val", shard_tokens=shard_tokens, tokenizer=INFO)
    for one, order in piles:
        writer.add(one, order)
    writer.flush()
    result = []
    for entry in writer.entries:
        with h5py.File(folder / entry.name) as file:
            tokens, offsets = file["tokens"][:], file["doc_offsets"][:]
        assert len(tokens) <= shard_tokens
        result.append([tokens[a:b].tolist() for a, b in pairwise(offsets)])
    sizes = [int(one.text_bytes[order].sum()) for one, order in piles]
    assert sum(entry.text_bytes for entry in writer.entries) == sum(sizes)
    return result


def test_every_document_ends_with_eos_and_a_long_one_is_cut(tmp_path: Path) -> None:
    kept = pile(tmp_path / "a", [3, 0, 25, 10], limit=10)
    assert kept.lengths.tolist() == [4, 1, 11, 11, 6, 11]
    assert kept.text_bytes.tolist() == [9, 0, 30, 30, 16, 30]
    tokens = tokens_of(kept)
    assert (tokens[np.cumsum(kept.lengths) - 1] == EOS).all()
    assert np.count_nonzero(tokens == 12) == 25


def test_a_text_without_tokens_keeps_its_bytes(tmp_path: Path) -> None:
    with PileWriter(tmp_path / "a", eos_id=EOS, dtype=U2, limit=10) as writer:
        writer.end(7)
        writer.flush()
    found = Pile(tmp_path / "a", U2)
    assert (found.lengths.tolist(), found.text_bytes.tolist()) == ([1], [7])


def test_shards_are_filled_in_order_and_cut_between_documents(tmp_path: Path) -> None:
    parts = [pile(tmp_path / str(i), lengths) for i, lengths in enumerate([[3, 4], [], [2, 9, 1]])]
    found = shards(tmp_path, [(part, np.arange(len(part.lengths))) for part in parts], 10)
    assert [[len(d) for d in shard] for shard in found] == [[4, 5], [3], [10], [2]]
    assert [d[0] for shard in found for d in shard] == [10, 11, 10, 11, 12]


def test_how_documents_come_does_not_show(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 12, 200)]
    kept = pile(tmp_path / "a", lengths)
    for name, orders in [("whole", [np.arange(200)]), ("parts", np.array_split(np.arange(200), 37))]:
        (tmp_path / name).mkdir()
        shards(tmp_path / name, [(kept, order) for order in orders], 50)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_an_order_keeps_every_document_whole_and_seed_and_task_change_it(tmp_path: Path) -> None:
    kept = pile(tmp_path / "a", list(range(1, 40)))
    order = shuffled(39, seed=1, key=2)
    assert sorted(order.tolist()) == list(range(39))
    assert len({tuple(shuffled(39, seed=seed, key=task)) for seed in (0, 1) for task in (2, 3)}) == 4
    assert shuffled(0, seed=1, key=2).tolist() == []
    save_in_order([(kept, order)], tmp_path / "b", U2)
    mixed = Pile(tmp_path / "b", U2)
    assert mixed.text_bytes.tolist() == [3 * (i + 1) + (i >= 20) for i in order]
    tokens = tokens_of(mixed)
    for i, end in zip(order.tolist(), np.cumsum(mixed.lengths).tolist(), strict=True):
        assert tokens[end - i - 2 : end].tolist() == [10 + i] * (i + 1) + [EOS]
    assert sorted(path.suffix for path in tmp_path.glob("b*")) == [".bytes", ".lengths", ".tokens"]
    remove(tmp_path / "b")
    assert not [*tmp_path.glob("b*")]


def test_lengths_do_not_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piles, "_FLUSH_DOCUMENTS", 10)
    with PileWriter(tmp_path / "a", eos_id=0, dtype=U2, limit=9) as writer:
        for _ in range(25):
            writer.add(np.ones(3, U2))
            writer.end(3)
        assert (tmp_path / "a.lengths").stat().st_size == (tmp_path / "a.bytes").stat().st_size == 20 * 4
        writer.flush()
    with Pile(tmp_path / "a", U2) as pile:
        assert pile.lengths.tolist() == [4] * 25


@pytest.mark.parametrize("lengths", [[], [3, 1, 4]])
def test_small_piles(lengths: list[int], tmp_path: Path) -> None:
    kept = pile(tmp_path / "a", lengths)
    save_in_order([(kept, np.arange(len(lengths)))], tmp_path / "b", U2)
    assert tokens_of(Pile(tmp_path / "b", U2)).tolist() == tokens_of(kept).tolist()


def test_groups_of_a_pile_are_the_pile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pile(tmp_path / "a", [*range(10)])
    monkeypatch.setattr(piles, "GROUP_DOCUMENTS", 4)
    found = [
        (tokens_of(group).tolist(), group.lengths.tolist()) for group in piles.groups(tmp_path / "a", U2)
    ]
    assert [len(lengths) for _, lengths in found] == [4, 4, 2]
    assert [token for tokens, _ in found for token in tokens] == tokens_of(kept).tolist()
    assert piles.count_tokens(tmp_path / "a", U2) == int(kept.lengths.sum())
    turned = ((group, np.arange(len(group.lengths))[::-1]) for group in piles.groups(tmp_path / "a", U2))
    save_in_order(turned, tmp_path / "b", U2)
    mixed = [group.lengths.tolist() for group in piles.groups(tmp_path / "b", U2)]
    assert mixed == [lengths[::-1] for _, lengths in found]
    pile(tmp_path / "none", [])
    assert [len(group.lengths) for group in piles.groups(tmp_path / "none", U2)] == [0]


def test_a_shard_has_only_so_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "GROUP_DOCUMENTS", 3)
    kept = pile(tmp_path / "a", [1, 2, 3, 4, 5, 6, 7])
    found = shards(tmp_path, [(kept, np.arange(2)), (kept, np.arange(2, 7))], 20)
    assert [[len(d) - 1 for d in shard] for shard in found] == [[1, 2, 3], [4, 5, 6], [7]]
