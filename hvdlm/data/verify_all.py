"""Every byte of a data set: its tokenizer, and of each shard size, digests, structure, ids and documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.digests import digest_block, digest_content, digest_file
from hvdlm.data.entries import BLOCK_TOKENS, MalformedError, ShardEntry, TokenizerInfo
from hvdlm.data.extents import read_block, read_whole
from hvdlm.data.files import open_checked
from hvdlm.data.manifest import read_manifest
from hvdlm.data.structure import check_structure
from hvdlm.data.verify import Problem


def verify_folder(folder: Path, *, report: Callable[[ShardEntry], None] | None = None) -> list[Problem]:
    """Check everything: the tokenizer, and of each shard size, digest, structure, blocks, ids, documents.

    Args:
        folder: The data set.
        report: Called after each shard.

    Returns:
        What is wrong, in the order of the manifest; empty if nothing is.

    Raises:
        UserError: There is no usable manifest.
    """
    manifest = read_manifest(folder)
    problems = _tokenizer_problems(folder, manifest.tokenizer)
    for entry in manifest.shards:
        problems += verify_shard(folder / entry.name, entry, manifest.tokenizer)
        if report is not None:
            report(entry)
    return problems


def verify_shard(path: Path, entry: ShardEntry, tokenizer: TokenizerInfo) -> list[Problem]:
    """Check one shard. HDF5 sees it only if the digest of the whole file is right."""
    try:
        fd = open_checked(path, entry.file_bytes)
        try:
            intact = digest_file(path) == entry.xxh3_128
            problems = _content_problems(fd, path, entry, tokenizer)
        finally:
            os.close(fd)
        if intact:
            check_structure(path, entry, tokenizer)
        elif not problems:
            problems = [Problem(entry.name, None, "damaged outside its tokens and documents")]
        return problems
    except (UserError, MalformedError, OSError) as error:
        return [Problem.unreadable(path, error)]


def _tokenizer_problems(folder: Path, tokenizer: TokenizerInfo) -> list[Problem]:
    try:
        found = hashlib.sha256((folder / tokenizer.file).read_bytes()).hexdigest()
    except OSError as error:
        return [Problem(tokenizer.file, None, f"cannot be read: {error.strerror}")]
    if found != tokenizer.sha256:
        return [Problem(tokenizer.file, None, "not the tokenizer that made the shards (sha256)")]
    return []


def _content_problems(fd: int, path: Path, entry: ShardEntry, tokenizer: TokenizerInfo) -> list[Problem]:
    """What is wrong with the three data sets, read at the manifest's positions."""
    stored = read_whole(fd, path, entry.extents.block_xxh3)
    offsets = read_whole(fd, path, entry.extents.doc_offsets)
    rising = offsets[0] == 0 and offsets[-1] == entry.tokens and bool((offsets[1:] > offsets[:-1]).all())
    computed, invalid = np.empty_like(stored), []
    for block in range(len(stored)):
        tokens = read_block(fd, path, entry, block)
        computed[block] = digest_block(tokens)
        if int(tokens.max()) >= tokenizer.vocab_size:
            invalid.append(Problem(entry.name, block, f"holds an id beyond {tokenizer.vocab_size - 1}"))
        elif rising and not _documents_end(tokens, offsets, block, tokenizer.eos_id):
            invalid.append(Problem(entry.name, block, f"a document does not end with id {tokenizer.eos_id}"))
    damaged = [Problem.in_block(entry, block) for block in np.flatnonzero(computed != stored).tolist()]
    if digest_content(computed, offsets) != entry.content_xxh3_128:
        return damaged or [Problem(entry.name, None, "its doc_offsets do not match their digest")]
    if damaged:
        return [Problem(entry.name, None, "its table of block digests is damaged, its tokens are intact")]
    return invalid if rising else [Problem(entry.name, None, "its doc_offsets do not rise from 0 to tokens")]


def _documents_end(tokens: np.ndarray, offsets: np.ndarray, block: int, eos_id: int) -> bool:
    """Whether every document that ends in this block does so with eos."""
    first = block * BLOCK_TOKENS
    low, high = np.searchsorted(offsets, [first, first + len(tokens)], side="right")
    last = offsets[low:high] - np.uint64(first + 1)
    return bool((tokens[last.astype(np.int64)] == eos_id).all())
