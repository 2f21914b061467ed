"""Megatron-LM's token files: PREFIX.bin holds the ids of all sequences, PREFIX.idx where they lie.

    .idx: "MMIDIDX" NUL NUL | u8 version = 1 | u1 type of the ids | u8 sequences s | u8 entries d
          | s x i4 ids of each sequence | s x i8 byte of .bin where each begins | d x i8 documents

All little-endian. Entry 0 of the documents is 0, entry k the number of sequences in the first k
documents, so d is their number + 1. A document is one sequence, or one for each of its sentences.

Source: github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.chunks import CHUNK_TOKENS, Chunk
from hvdlm.data.entries import Extent
from hvdlm.data.extents import read_part
from hvdlm.data.files import open_checked
from hvdlm.data.nanogpt import file_size

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer types by their code; 6 and 7 are floating-point."""
_BLOCK = 1 << 17


def with_suffix(prefix: Path, suffix: str) -> Path:
    """PREFIX.bin or PREFIX.idx: appended, because a prefix may have dots."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


@dataclass(frozen=True)
class Index:
    """The head of a .idx: where its tables lie, and what .bin must hold."""

    path: Path
    file_bytes: int
    bin_bytes: int
    dtype: np.dtype
    lengths: Extent
    pointers: Extent
    documents: Extent


def read_megatron(prefix: Path) -> Iterator[Chunk]:
    """The documents of PREFIX.bin, in bounded memory; those without a token are left out.

    Args:
        prefix: Of the two files.

    Yields:
        Tokens of the type that the index tells.

    Raises:
        UserError: The files are missing, truncated, contradict each other or are something else.
    """
    index = open_index(prefix)
    path = with_suffix(prefix, "bin")
    tokens = Extent(0, index.dtype.str, index.bin_bytes // index.dtype.itemsize)
    fd = open_checked(path, index.bin_bytes)
    try:
        first = 0
        for ends in _document_ends(index):
            while len(ends) and first < ends[-1]:
                size = min(CHUNK_TOKENS, int(ends[-1]) - first)
                low, high = np.searchsorted(ends, [first, first + size], "right")
                chunk = read_part(fd, path, tokens, first=first, size=size)
                yield Chunk(chunk, ends[low:high] - first)
                first += size
    finally:
        os.close(fd)


def open_index(prefix: Path) -> Index:
    """Read and check what can be checked of PREFIX.idx at once, whatever its size.

    Raises:
        UserError: The files are missing, truncated, contradict each other or are something else.
    """
    path = with_suffix(prefix, "idx")
    file_bytes, bin_bytes = file_size(path), file_size(with_suffix(prefix, "bin"))
    fd = open_checked(path, file_bytes)
    try:
        head = os.pread(fd, HEADER.size, 0)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise _malformed(path, "does not begin as an index of Megatron-LM does")
        _, version, code, sequences, entries = HEADER.unpack(head)
        if version != VERSION or code not in DTYPES:
            raise _malformed(
                path, f"version {version} with ids of type {code}; needed version {VERSION} and integers"
            )
        index = _lay_out(path, (file_bytes, bin_bytes), np.dtype(DTYPES[code]), (sequences, entries))
        _check_ends(fd, index)
    finally:
        os.close(fd)
    return index


def _lay_out(path: Path, sizes: tuple[int, int], dtype: np.dtype, counts: tuple[int, int]) -> Index:
    (file_bytes, bin_bytes), (sequences, entries) = sizes, counts
    lengths = Extent(HEADER.size, "<i4", sequences)
    pointers = Extent(lengths.end, "<i8", sequences)
    documents = Extent(pointers.end, "<i8", entries)
    if file_bytes == documents.end + sequences and sequences:
        raise _malformed(path, "it has modes, so the data are multimodal; needed text alone")
    if file_bytes != documents.end or not sequences or entries < 2:
        found = f"{file_bytes} bytes with {sequences} sequences and {entries} entries for documents"
        raise _malformed(path, f"{found}; needed {documents.end} bytes and one document at least")
    return Index(path, file_bytes, bin_bytes, dtype, lengths, pointers, documents)


def _check_ends(fd: int, index: Index) -> None:
    """First and last entries: a truncated .bin is found before hours of work."""
    last = index.lengths.size - 1
    length = int(read_part(fd, index.path, index.lengths, first=last, size=1)[0])
    pointer = int(read_part(fd, index.path, index.pointers, first=last, size=1)[0])
    needed = pointer + length * index.dtype.itemsize
    if needed != index.bin_bytes:
        raise _malformed(index.path, f"its .bin has {index.bin_bytes} bytes, needed {needed}")
    bounds = [
        int(read_part(fd, index.path, index.documents, first=place, size=1)[0])
        for place in (0, index.documents.size - 1)
    ]
    if bounds != [0, index.lengths.size]:
        raise _malformed(index.path, f"its documents are of sequences {bounds[0]} to {bounds[1]}, not of all")


def _document_ends(index: Index) -> Iterator[np.ndarray]:
    """Blocks of int64: the token after each document that has any, rising through the whole file."""
    fd = open_checked(index.path, index.file_bytes)
    try:
        position, last_end, document, last_count = 0, 0, 1, 0
        for first in range(0, index.lengths.size, _BLOCK):
            size = min(_BLOCK, index.lengths.size - first)
            lengths = read_part(fd, index.path, index.lengths, first=first, size=size).astype(np.int64)
            pointers = read_part(fd, index.path, index.pointers, first=first, size=size)
            bounds = position + np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            if (lengths < 0).any() or (pointers != bounds[:-1] * index.dtype.itemsize).any():
                raise _malformed(index.path, "its sequences do not follow each other in the .bin")
            position = int(bounds[-1])
            # Entries that rise are never below the range: those below were of an earlier one.
            while len(counts := _ends_in(fd, index, document, (max(first, last_count), first + size))):
                ends = bounds[counts - first]
                yield ends[np.diff(ends, prepend=last_end) > 0]
                last_end, document = int(ends[-1]), document + len(counts)
                last_count = int(counts[-1])
    finally:
        os.close(fd)
    if document != index.documents.size:
        raise _malformed(index.path, "its documents do not end with its sequences")


def _ends_in(fd: int, index: Index, document: int, sequences: tuple[int, int]) -> np.ndarray:
    """Some of the next documents' ends, as numbers of sequences, in this range; none where it is done."""
    size = min(_BLOCK, index.documents.size - document)
    counts = read_part(fd, index.path, index.documents, first=document, size=size)
    if size and (counts[0] < sequences[0] or (counts[1:] < counts[:-1]).any()):
        raise _malformed(index.path, "its documents do not rise")
    return counts[: np.searchsorted(counts, sequences[1], "right")]


def _malformed(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a usable index: {reason}; copy .bin and .idx again")
