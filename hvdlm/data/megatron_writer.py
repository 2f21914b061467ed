"""A split of a data set as Megatron-LM's PREFIX.bin and PREFIX.idx; the layout is told in `data.megatron`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.digests import digest_block, digest_content
from hvdlm.data.entries import Extent, ShardEntry
from hvdlm.data.extents import read_block, read_whole
from hvdlm.data.files import cure, open_checked, publishing, write_exactly
from hvdlm.data.manifest import Manifest
from hvdlm.data.megatron import DTYPES, HEADER, MAGIC, VERSION, with_suffix
from hvdlm.data.verify import Problem

_UINT16, _INT32 = 8, 4
_MEGATRON_UINT16_BELOW = 65500
"""Megatron-LM's own writer takes uint16 for vocabularies smaller than this."""


def write_megatron(
    folder: Path, manifest: Manifest, split: str, *, prefix: Path, report: Callable[[int], None]
) -> None:
    """Write one split: a document is one sequence, eos included. Every token is checked as it is read.

    Args:
        folder: The data set.
        manifest: Its manifest.
        split: "train" or "val", not empty.
        prefix: Of the two files, which are replaced; .idx appears last.
        report: Called with the bytes of tokens that were read.

    Raises:
        UserError: A shard is damaged, the disk is full, or Megatron's types cannot hold it.
    """
    code = _UINT16 if manifest.tokenizer.vocab_size < _MEGATRON_UINT16_BELOW else _INT32
    if manifest.tokenizer.vocab_size > 1 << 31:
        raise UserError(f"{folder}: has ids beyond 2^31 - 1, which Megatron-LM's files cannot hold")
    ids = np.dtype(DTYPES[code])
    with publishing(with_suffix(prefix, "idx")) as idx, publishing(with_suffix(prefix, "bin")) as data:
        index = _IndexWriter(idx, code, manifest.documents(split))
        try:
            with data.open("xb") as file:
                for entry in manifest.split(split):
                    for lengths, tokens in _checked(folder / entry.name, entry):
                        index.add(lengths)
                        file.write(tokens.astype(ids).data)
                        report(tokens.nbytes)
        finally:
            index.close()


@final
class _IndexWriter:
    """Fills the three tables of a .idx from their beginnings, so that none is ever in memory whole."""

    def __init__(self, path: Path, code: int, documents: int) -> None:
        self._item_bytes = np.dtype(DTYPES[code]).itemsize
        self._lengths = Extent(HEADER.size, "<i4", documents)
        self._pointers = Extent(self._lengths.end, "<i8", documents)
        self._documents = Extent(self._pointers.end, "<i8", documents + 1)
        self._written, self._tokens = 0, 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        head = HEADER.pack(MAGIC, VERSION, code, documents, documents + 1)
        write_exactly(self._fd, memoryview(head), 0)
        self._put(self._documents, np.zeros(1, np.int64), 0)

    def add(self, lengths: np.ndarray) -> None:
        """Append documents of so many tokens: int64 [n]."""
        if not len(lengths):
            return
        ends = self._tokens + np.cumsum(lengths)
        self._put(self._lengths, lengths, self._written)
        self._put(self._pointers, (ends - lengths) * self._item_bytes, self._written)
        count = np.arange(self._written + 1, self._written + len(lengths) + 1)
        self._put(self._documents, count, self._written + 1)
        self._written, self._tokens = self._written + len(lengths), int(ends[-1])

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _put(self, table: Extent, values: np.ndarray, first: int) -> None:
        array = values.astype(table.dtype)
        write_exactly(self._fd, array.data.cast("B"), table.offset + first * array.itemsize)


def _checked(path: Path, entry: ShardEntry) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """With each block of tokens the lengths of documents: with the first block all, with others none."""
    fd = open_checked(path, entry.file_bytes)
    try:
        stored = read_whole(fd, path, entry.extents.block_xxh3)
        offsets = read_whole(fd, path, entry.extents.doc_offsets)
        if digest_content(stored, offsets) != entry.content_xxh3_128:
            raise UserError(f"{path}: its doc_offsets or block digests are damaged; {cure(path.parent)}")
        lengths = np.diff(offsets.astype(np.int64))
        if lengths.min() < 1 or lengths.sum() != entry.tokens:
            raise UserError(f"{path}: its doc_offsets do not rise from 0 to tokens; {cure(path.parent)}")
        if lengths.max() >= 1 << 31:
            raise UserError(f"{path}: has a document of over 2^31 - 1 tokens; Megatron-LM's files hold none")
        for block in range(len(stored)):
            tokens = read_block(fd, path, entry, block)
            if digest_block(tokens) != int(stored[block]):
                raise UserError(f"{path}: {Problem.in_block(entry, block).detail}; {cure(path.parent)}")
            yield lengths, tokens
            lengths = lengths[:0]
    finally:
        os.close(fd)
