"""Parts of a shard's data sets, read by position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvdlm.data.entries import BLOCK_TOKENS, Extent, ShardEntry
from hvdlm.data.files import read_exactly

_PIECE_BYTES = 1 << 20  # Stays in the cache between reading and hashing.


def read_part(fd: int, path: Path, extent: Extent, *, first: int, size: int) -> np.ndarray:
    """Elements [first, first + size) of a data set.

    Args:
        fd: An open descriptor of the shard.
        path: Its name in messages.
        extent: The data set, which reaches so far.
        first: In elements.
        size: In elements.

    Returns:
        [size], of the extent's dtype.

    Raises:
        UserError: The file ends too early, or the device reports an error.
    """
    array = np.empty(size, extent.dtype)
    read_exactly(fd, array.data.cast("B"), extent.offset + first * array.itemsize, path)
    return array


def read_whole(fd: int, path: Path, extent: Extent) -> np.ndarray:
    """A whole data set, as `read_part`."""
    return read_part(fd, path, extent, first=0, size=extent.size)


def read_block(fd: int, path: Path, entry: ShardEntry, block: int) -> np.ndarray:
    """The tokens that one digest covers, as `read_part`."""
    first = block * BLOCK_TOKENS
    size = min(BLOCK_TOKENS, entry.tokens - first)
    return read_part(fd, path, entry.extents.tokens, first=first, size=size)


def read_pieces(
    fd: int, path: Path, *, first: int, end: int, piece_bytes: int = _PIECE_BYTES
) -> Iterator[memoryview]:
    """The bytes [first, end) of a file, `piece_bytes` at a time; each piece is overwritten by the next.

    Raises:
        UserError: The file ends too early, or the device reports an error.
    """
    buffer = memoryview(bytearray(min(piece_bytes, max(0, end - first))))
    for start in range(first, end, piece_bytes):
        piece = buffer[: min(piece_bytes, end - start)]
        read_exactly(fd, piece, start, path)
        yield piece
