"""The shard format, version 1: one HDF5 file of tokens that any HDF5 tool reads. See docs/formats.md.

HDF5 only lays the file out; the data are written and read by position, because libhdf5
reports a full disk late and checks nothing of contiguous data.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from hvdlm.data.digests import digest_block, digest_content, digest_file
from hvdlm.data.entries import (
    BLOCK_TOKENS,
    SPLITS,
    Extent,
    Extents,
    ShardEntry,
    TokenizerInfo,
    check_extents,
)
from hvdlm.data.files import publishing, write_exactly

FORMAT = "hvdlm-shard"
VERSION = 1
MAX_SHARD_TOKENS = 64 << 20
"""Writers cut shards at a document boundary before this many tokens; one longer document is one shard."""
ALIGNMENT = 1 << 20
"""Byte alignment of /tokens: a Lustre stripe and a RAID chunk divide it."""


def write_shard(
    path: Path,
    tokens: np.ndarray,
    doc_offsets: np.ndarray,
    *,
    split: str,
    text_bytes: int,
    tokenizer: TokenizerInfo,
) -> ShardEntry:
    """Write one shard atomically; equal input gives equal bytes.

    Args:
        path: FOLDER/train-00000.h5 or the like; replaced if it exists.
        tokens: Integers [t], the documents one after the other, each ending with eos.
        doc_offsets: Integers [n + 1]: 0, the first token of every later document, t.
        split: "train" or "val".
        text_bytes: UTF-8 bytes of the documents.
        tokenizer: What made the ids.

    Returns:
        The shard's row of the manifest.

    Raises:
        UserError: The disk is full or over quota.
        ValueError: The arrays do not describe documents of this tokenizer.
    """
    if tokens.ndim != 1 or doc_offsets.ndim != 1 or not len(tokens) or len(doc_offsets) < 2:
        raise ValueError("a shard needs one-dimensional arrays and at least one document")
    if doc_offsets[-1] != len(tokens):
        raise ValueError("doc_offsets must rise from 0 to the number of tokens")
    blocks = (tokens[first : first + BLOCK_TOKENS] for first in range(0, len(tokens), BLOCK_TOKENS))
    return write_blocks(path, blocks, doc_offsets, split=split, text_bytes=text_bytes, tokenizer=tokenizer)


def write_blocks(
    path: Path,
    blocks: Iterable[np.ndarray],
    doc_offsets: np.ndarray,
    *,
    split: str,
    text_bytes: int,
    tokenizer: TokenizerInfo,
) -> ShardEntry:
    """Write one shard as `write_shard`, with one block of its tokens in memory at a time.

    Args:
        path: As there.
        blocks: Together the tokens; each has `BLOCK_TOKENS`, the last may have fewer.
        doc_offsets: As there, and so on.
    """
    offsets = np.ascontiguousarray(doc_offsets, dtype="<u8")
    if offsets[0] != 0 or not (offsets[1:] > offsets[:-1]).all():
        raise ValueError("doc_offsets must rise from 0 to the number of tokens")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    counts = {"tokens": int(offsets[-1]), "documents": len(offsets) - 1, "text_bytes": int(text_bytes)}
    with publishing(path) as temp:
        sizes = (counts["tokens"], len(offsets))
        extents = _lay_out(temp, sizes, tokenizer, attributes_of(tokenizer, split, **counts))
        block_xxh3 = _fill(temp, blocks, offsets, extents=extents, tokenizer=tokenizer)
        entry = ShardEntry(
            name=path.name,
            split=split,
            **counts,
            file_bytes=temp.stat().st_size,
            xxh3_128=digest_file(temp),
            content_xxh3_128=digest_content(block_xxh3, offsets),
            extents=extents,
        )
        check_extents(entry, tokenizer)
    return entry


def attributes_of(
    tokenizer: TokenizerInfo, split: str, *, tokens: int, documents: int, text_bytes: int
) -> dict[str, str | int]:
    """The attributes of a shard's root group: strings of fixed length and unsigned 64-bit integers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokens": tokens,
        "documents": documents,
        "text_bytes": text_bytes,
    }


def _lay_out(
    path: Path, sizes: tuple[int, int], tokenizer: TokenizerInfo, attributes: dict[str, str | int]
) -> Extents:
    """Create the file with every data set (sizes: of tokens, of offsets) allocated and nothing filled in."""
    tokens, offsets = sizes
    wanted = {
        "doc_offsets": Extent(0, "<u8", offsets),
        "block_xxh3": Extent(0, "<u8", -(-tokens // BLOCK_TOKENS)),
        "tokens": Extent(0, tokenizer.token_dtype, tokens),
    }
    try:
        # The 1.8 format checksums its metadata, carries no times, and old tools read it. HDF5 aligns
        # whatever is as large as the threshold: nothing but the tokens, unless they are few.
        with h5py.File(
            path,
            "x",
            libver=("v108", "v108"),
            locking=False,
            alignment_threshold=wanted["tokens"].end,
            alignment_interval=ALIGNMENT,
        ) as file:
            for name, value in attributes.items():
                file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.uint64(value)
            return Extents(**{name: _allocate(file, name, extent) for name, extent in wanted.items()})
    except (OSError, RuntimeError) as error:
        # libhdf5 tells the errno in its text, and h5py passes it on only sometimes.
        told = re.search(r"errno = (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _allocate(file: h5py.File, name: str, wanted: Extent) -> Extent:
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    space, kind = h5py.h5s.create_simple((wanted.size,)), h5py.h5t.py_create(np.dtype(wanted.dtype))
    data_set = h5py.h5d.create(file.id, name.encode(), kind, space, create)
    return replace(wanted, offset=data_set.get_offset())


def _fill(
    path: Path,
    blocks: Iterable[np.ndarray],
    offsets: np.ndarray,
    *,
    extents: Extents,
    tokenizer: TokenizerInfo,
) -> np.ndarray:
    """Write everything; the digests of the blocks."""
    digests, first, place = [], 0, extents.tokens.offset
    ends = offsets[1:].astype(np.int64)
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for block in blocks:
            low, high = np.searchsorted(ends, [first, first + len(block)], "right")
            stored = _checked(block, ends[low:high] - first, tokenizer)
            write_exactly(fd, stored.data.cast("B"), place)
            digests.append(digest_block(stored))
            first, place = first + len(block), place + stored.nbytes
        if first != extents.tokens.size or len(digests) != extents.block_xxh3.size:
            raise ValueError(f"{first} tokens in {len(digests)} blocks, needed {extents.tokens.size}")
        block_xxh3 = np.array(digests, "<u8")
        write_exactly(fd, offsets.data.cast("B"), extents.doc_offsets.offset)
        write_exactly(fd, block_xxh3.data.cast("B"), extents.block_xxh3.offset)
    finally:
        os.close(fd)
    return block_xxh3


def _checked(block: np.ndarray, ends: np.ndarray, tokenizer: TokenizerInfo) -> np.ndarray:
    """A block as it is stored."""
    if block.dtype.kind not in "iu" or int(block.min()) < 0 or int(block.max()) >= tokenizer.vocab_size:
        raise ValueError(f"a token id is not an integer from 0 to {tokenizer.vocab_size - 1}")
    if not (block[ends - 1] == tokenizer.eos_id).all():
        raise ValueError("a document does not end with eos")
    return np.ascontiguousarray(block, dtype=tokenizer.token_dtype)
