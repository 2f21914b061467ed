"""The digests of the shard format: of a block of tokens, of the content, of the whole file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from hvdlm.data.entries import BLOCK_TOKENS

_CHUNK_BYTES = 1 << 20  # Stays in the cache between reading and hashing.


def digest_blocks(tokens: np.ndarray) -> np.ndarray:
    """One xxh3_64 for the raw bytes of every 1 Mi tokens: `<u8` [ceil(t / 2^20)]."""
    starts = range(0, len(tokens), BLOCK_TOKENS)
    return np.array([digest_block(tokens[start : start + BLOCK_TOKENS]) for start in starts], dtype="<u8")


def digest_block(tokens: np.ndarray) -> int:
    """The xxh3_64 of the raw bytes of one block of tokens."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


def digest_content(block_xxh3: np.ndarray, doc_offsets: np.ndarray) -> str:
    """xxh3_128 hex of a shard's tokens and documents, whatever the layout of the file."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(block_xxh3, "<u8").tobytes())
    digest.update(np.ascontiguousarray(doc_offsets, "<u8").tobytes())
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """xxh3_128 hex of a whole file, read in pieces.

    Raises:
        OSError: It cannot be read.
    """
    digest = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
