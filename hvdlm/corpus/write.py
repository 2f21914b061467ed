"""Encoded documents -> shards of bounded size, cut between documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from hvdlm.data.entries import ShardEntry, TokenizerInfo
from hvdlm.data.order import permute
from hvdlm.data.shards import write_shard

_GATHER_DOCUMENTS = 1 << 16


class Documents(NamedTuple):
    """Encoded documents, one after the other.

    Attributes:
        tokens: unsigned integers [t], each document ending with eos.
        lengths: int64 [n], tokens of each document, eos included; at least 1.
        text_bytes: int64 [n], UTF-8 bytes of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray

    def shuffled(self, *, seed: int, task: int) -> Iterator[Documents]:
        """The same documents in an order that follows from (seed, task), some thousands at a time."""
        n = len(self.lengths)
        if n == 0:
            return
        order = permute(np.arange(n), n, seed=seed, epochs=np.full(n, task, np.int64))
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        for first in range(0, n, _GATHER_DOCUMENTS):
            chosen = order[first : first + _GATHER_DOCUMENTS]
            parts = [
                self.tokens[a:b] for a, b in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
            ]
            yield Documents(np.concatenate(parts), self.lengths[chosen], self.text_bytes[chosen])


def save(stem: Path, documents: Iterable[Documents]) -> None:
    """Write documents to three plain files beside each other, to be read by `load`.

    Raises:
        OSError: the disk is full.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(stem.with_suffix(f".{name}").open("wb")) for name in Documents._fields]
        for block in documents:
            for file, array in zip(files, block, strict=True):
                # Not numpy's own writers: they report a full disk without an errno.
                file.write(np.ascontiguousarray(array).data)


def load(stem: Path, dtype: str) -> Documents:
    """Read what `save` wrote.

    Args:
        stem: as given to `save`.
        dtype: of the tokens, as numpy names it.
    """
    names = zip(Documents._fields, (dtype, "<i8", "<i8"), strict=True)
    return Documents(*(np.fromfile(stem.with_suffix(f".{name}"), kind) for name, kind in names))


@final
class DocumentList:
    """Documents as they are encoded: grows by a few arrays a batch, not by one a document."""

    def __init__(self, shard_tokens: int, eos_id: int, dtype: np.dtype) -> None:
        self._shard_tokens = shard_tokens
        self._eos = np.array([eos_id], dtype=dtype)
        self._batches: list[Documents] = []

    def add(self, encoded: list[np.ndarray], text_bytes: list[int]) -> None:
        """Append documents and eos after each; one that is longer than a shard becomes several.

        Args:
            encoded: ids of each document, without eos.
            text_bytes: UTF-8 bytes of each document.
        """
        arrays: list[np.ndarray] = []
        lengths: list[int] = []
        sizes: list[int] = []
        for ids, size in zip(encoded, text_bytes, strict=True):
            for part, part_bytes in _parts(ids, size, self._shard_tokens - 1):
                arrays += (part, self._eos)
                lengths.append(len(part) + 1)
                sizes.append(part_bytes)
        if arrays:
            batch = Documents(np.concatenate(arrays), np.array(lengths, np.int64), np.array(sizes, np.int64))
            self._batches.append(batch)

    def take(self) -> Documents:
        """Everything that was added, once."""
        batches, self._batches = self._batches, []
        empty = Documents(self._eos[:0], np.zeros(0, np.int64), np.zeros(0, np.int64))
        return Documents(*(np.concatenate(arrays) for arrays in zip(empty, *batches, strict=True)))


@final
class ShardWriter:
    """Writes documents in the order they come, as many to a shard as fit."""

    def __init__(self, stem: Path, split: str, *, shard_tokens: int, tokenizer: TokenizerInfo) -> None:
        """Args:
        stem: FOLDER/NAME for FOLDER/NAME-00000.h5 and so on.
        split: "train" or "val".
        shard_tokens: tokens a shard at most.
        tokenizer: what made the ids.
        """
        self.entries: list[ShardEntry] = []
        self._stem, self._split = stem, split
        self._shard_tokens, self._tokenizer = shard_tokens, tokenizer
        self._pending: list[Documents] = []
        self._pending_tokens = 0

    def add(self, documents: Documents) -> None:
        """Append documents, none longer than a shard.

        Raises:
            UserError: the disk is full.
        """
        ends = np.cumsum(documents.lengths)
        first = first_token = 0
        while first < len(ends):
            room = self._shard_tokens - self._pending_tokens
            stop = int(np.searchsorted(ends, first_token + room, side="right"))
            if stop == first:
                self.flush()
                continue
            stop_token = int(ends[stop - 1])
            tokens = documents.tokens[first_token:stop_token]
            chosen = slice(first, stop)
            self._pending.append(Documents(tokens, documents.lengths[chosen], documents.text_bytes[chosen]))
            self._pending_tokens += len(tokens)
            first, first_token = stop, stop_token

    def flush(self) -> None:
        """Write what is pending as one shard.

        Raises:
            UserError: the disk is full.
        """
        if not self._pending:
            return
        tokens, lengths, text_bytes = (np.concatenate(arrays) for arrays in zip(*self._pending, strict=True))
        self._pending, self._pending_tokens = [], 0
        path = self._stem.with_name(f"{self._stem.name}-{len(self.entries):05d}.h5")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.entries.append(
            write_shard(
                path,
                tokens,
                offsets,
                split=self._split,
                text_bytes=int(text_bytes.sum()),
                tokenizer=self._tokenizer,
            )
        )


def _parts(ids: np.ndarray, text_bytes: int, limit: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut a document after every `limit` tokens; its bytes are shared out in proportion."""
    if len(ids) <= limit:
        yield ids, text_bytes
        return
    for start in range(0, len(ids), limit):
        stop = min(start + limit, len(ids))
        yield ids[start:stop], text_bytes * stop // len(ids) - text_bytes * start // len(ids)
