"""The shard format, version 1: one HDF5 file of tokens that any HDF5 tool reads. See docs/formats.md.

HDF5 only lays the file out; the data are written and read by position, because libhdf5
reports a full disk late and checks nothing of contiguous data.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import h5py
import numpy as np

from hvdlm.data.digests import digest_blocks, digest_content, digest_file
from hvdlm.data.entries import (
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
_DATA_SETS = ("doc_offsets", "block_xxh3", "tokens")


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
    arrays = _arrays(tokens, doc_offsets, tokenizer)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    counts = {"tokens": len(tokens), "documents": len(doc_offsets) - 1, "text_bytes": int(text_bytes)}
    with publishing(path) as temp:
        extents = _lay_out(temp, arrays, attributes_of(tokenizer, split, **counts))
        _fill(temp, arrays, extents)
        entry = ShardEntry(
            name=path.name,
            split=split,
            **counts,
            file_bytes=temp.stat().st_size,
            xxh3_128=digest_file(temp),
            content_xxh3_128=digest_content(arrays["block_xxh3"], arrays["doc_offsets"]),
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


def _arrays(tokens: np.ndarray, doc_offsets: np.ndarray, tokenizer: TokenizerInfo) -> dict[str, np.ndarray]:
    if tokens.ndim != 1 or doc_offsets.ndim != 1 or not len(tokens) or len(doc_offsets) < 2:
        raise ValueError("a shard needs one-dimensional arrays and at least one document")
    if tokens.dtype.kind not in "iu" or int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.vocab_size:
        raise ValueError(f"a token id is not an integer from 0 to {tokenizer.vocab_size - 1}")
    offsets = np.ascontiguousarray(doc_offsets, dtype="<u8")
    ends = offsets[1:]
    if offsets[0] != 0 or ends[-1] != len(tokens) or not (ends > offsets[:-1]).all():
        raise ValueError("doc_offsets must rise from 0 to the number of tokens")
    if not (tokens[ends.astype(np.int64) - 1] == tokenizer.eos_id).all():
        raise ValueError("a document does not end with eos")
    stored = np.ascontiguousarray(tokens, dtype=tokenizer.token_dtype)
    return {"tokens": stored, "doc_offsets": offsets, "block_xxh3": digest_blocks(stored)}


def _lay_out(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, str | int]) -> Extents:
    """Create the file with every data set allocated and nothing filled in."""
    try:
        # The 1.8 format checksums its metadata, carries no times, and old tools read it. HDF5 aligns
        # whatever is as large as the threshold: nothing but the tokens, unless they are few.
        with h5py.File(
            path,
            "x",
            libver=("v108", "v108"),
            locking=False,
            alignment_threshold=arrays["tokens"].nbytes,
            alignment_interval=ALIGNMENT,
        ) as file:
            for name, value in attributes.items():
                file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.uint64(value)
            return Extents(**{name: _allocate(file, name, arrays[name]) for name in _DATA_SETS})
    except (OSError, RuntimeError) as error:
        # libhdf5 tells the errno in its text, and h5py passes it on only sometimes.
        told = re.search(r"errno = (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _allocate(file: h5py.File, name: str, array: np.ndarray) -> Extent:
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    space = h5py.h5s.create_simple(array.shape)
    data_set = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, create)
    return Extent(data_set.get_offset(), array.dtype.str, len(array))


def _fill(path: Path, arrays: dict[str, np.ndarray], extents: Extents) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for name, array in arrays.items():
            write_exactly(fd, array.data.cast("B"), getattr(extents, name).offset)
    finally:
        os.close(fd)
