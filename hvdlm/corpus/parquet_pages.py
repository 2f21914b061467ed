"""A column of Parquet with huge pages, read in bounded memory.

pyarrow holds a page up to four times, compressed, unpacked, as a dictionary and in its arrays, for as long
as somebody reads texts out of it. Here a page is unpacked into a file, and its texts are read from there.

Source: README.md (data pages) and Encodings.md of Apache Parquet.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hvdlm.corpus.parquet_headers import (
    DICTIONARY,
    SNAPPY,
    UNCOMPRESSED,
    Page,
    pages_of,
    varint,
)
from hvdlm.data.files import unwritable

_BLOCK_BYTES = 1 << 20
_GROUPS_AT_ONCE = 1 << 12
_MAX_LEVEL_BYTES = 64 << 20


class TooLong(NamedTuple):
    """A text that is longer than a document can be, and was passed over: its bytes."""

    size_bytes: int


def read_cells(
    path: str, chunk: Any, *, optional: bool, longest_bytes: int, scratch: Path
) -> Iterator[bytes | TooLong | None]:
    """The cells of a column in a row group, in order; None for null.

    Args:
        path: the file.
        chunk: pyarrow's metadata of the column there; no page of it has an `obstacle`.
        optional: whether there may be nulls.
        longest_bytes: of a text.
        scratch: folder for unpacked pages. They have no names, so nothing is left there.

    Raises:
        OSError, ValueError: the file cannot be read, or is damaged.
        UserError: the disk of `scratch` is full.
    """
    dictionary: BinaryIO | None = None
    ends = np.zeros(0, np.int64)
    with Path(path).open("rb") as file, ExitStack() as stack:
        for page in pages_of(file, chunk):
            content = _unpacked(file, page, chunk.compression, scratch)
            if page.kind == DICTIONARY:
                stack.enter_context(content)
                if dictionary:
                    raise ValueError("two dictionaries")
                dictionary, ends = content, _ends(content, page)
                continue
            with content:
                valid = _valid(content, page, optional=optional)
                if page.uses_dictionary and dictionary:
                    texts = _found(content, dictionary, ends, longest_bytes)
                else:
                    texts = _in_turn(content, longest_bytes)
                for _ in range(page.values):
                    yield next(texts) if next(valid) else None


def _unpacked(file: BinaryIO, page: Page, codec: str, scratch: Path) -> BinaryIO:
    """A page's content, to be read from its beginning: in memory where it is short, otherwise in a file."""
    file.seek(page.start)
    with ExitStack() as stack:
        with _writing(scratch):
            content: BinaryIO = tempfile.TemporaryFile(dir=scratch) if page.is_huge else BytesIO()  # noqa: SIM115
            stack.enter_context(content)
        for block in _blocks(file, page, codec):
            with _writing(scratch):
                content.write(block)
            del block
        with _writing(scratch):
            size = content.tell()
            content.seek(0)
        if size != page.unpacked_bytes:
            raise ValueError(f"a page of {size} bytes, its header says {page.unpacked_bytes}")
        stack.pop_all()
        return content


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error) from error


def _blocks(file: BinaryIO, page: Page, codec: str) -> Iterator[bytes | memoryview]:
    """A page's content in turn, no more of it than its header says and one block."""
    import pyarrow as pa

    levels = file.read(page.level_bytes or 0)
    yield levels
    packed, left = file.read(page.packed_bytes - len(levels)), page.unpacked_bytes - len(levels)
    if len(packed) + len(levels) < page.packed_bytes:
        raise ValueError("ends in a page")
    if page.crc is not None and zlib.crc32(packed, zlib.crc32(levels)) != page.crc:
        raise ValueError("a page differs from its checksum")
    if codec == UNCOMPRESSED or not page.is_compressed:
        yield packed
    elif left == 0:
        # Nulls alone: some writers of Java compress nothing to nothing, which no codec unpacks.
        return
    elif codec == SNAPPY:
        # Otherwise pyarrow fills up with zeros.
        if varint(BytesIO(packed)) != left:
            raise ValueError("a page is of another length than its header says")
        yield memoryview(pa.decompress(packed, left, codec="snappy"))
    else:
        stream = pa.CompressedInputStream(pa.BufferReader(packed), codec.lower())
        while left >= 0 and (block := stream.read(_BLOCK_BYTES)):
            left -= len(block)
            yield block


def _valid(content: BinaryIO, page: Page, *, optional: bool) -> Iterator[int]:
    """1 for each value of a page that is a text, 0 for null."""
    size = page.level_bytes
    if size is None:
        size = int.from_bytes(_exactly(content, 4), "little") if optional else 0
    if size > _MAX_LEVEL_BYTES:
        raise ValueError(f"a page whose nulls take {size} bytes")
    levels = BytesIO(_exactly(content, size))
    return _hybrid(levels, 1) if optional else repeat(1)


def _in_turn(content: BinaryIO, longest_bytes: int) -> Iterator[bytes | TooLong]:
    while True:
        yield _text(content, longest_bytes)


def _found(
    content: BinaryIO, dictionary: BinaryIO, ends: np.ndarray, longest_bytes: int
) -> Iterator[bytes | TooLong]:
    """The texts of a page that has their places in a dictionary."""
    width = _exactly(content, 1)[0]
    if width > 32:
        raise ValueError(f"places in a dictionary of {width} bits")
    for place in _hybrid(content, width):
        if place >= len(ends):
            raise ValueError(f"text {place} of a dictionary of {len(ends)}")
        dictionary.seek(int(ends[place - 1]) if place else 0)
        yield _text(dictionary, longest_bytes)


def _text(content: BinaryIO, longest_bytes: int) -> bytes | TooLong:
    size = int.from_bytes(_exactly(content, 4), "little")
    if size <= longest_bytes:
        return _exactly(content, size)
    content.seek(size - 1, os.SEEK_CUR)
    _exactly(content, 1)
    return TooLong(size)


def _ends(dictionary: BinaryIO, page: Page) -> np.ndarray:
    """Where each text of a dictionary ends: int64 [values]."""
    sizes = (int.from_bytes(_exactly(dictionary, 4), "little") for _ in range(page.values))
    ends = np.fromiter((dictionary.seek(size, os.SEEK_CUR) for size in sizes), np.int64, page.values)
    if len(ends) and ends[-1] > page.unpacked_bytes:
        raise ValueError("ends in a dictionary")
    return ends


def _hybrid(stream: BinaryIO, width: int) -> Iterator[int]:
    """Numbers of `width` bits, in runs of one number or packed by eights, until a ValueError at the end."""
    if width == 0:
        yield from repeat(0)
    while True:
        count, is_packed = divmod(varint(stream), 2)
        if count >= 1 << 31:
            raise ValueError("a run of more than 31 bits")
        if not is_packed:
            number = int.from_bytes(_exactly(stream, -(-width // 8)), "little")
            if number >> width:
                raise ValueError(f"{number} among numbers of {width} bits")
            yield from repeat(number, count)
        while is_packed and count:
            groups = min(count, _GROUPS_AT_ONCE)
            packed = stream.read(groups * width)
            # Some writers end a page within the last group, or before groups that nobody needs.
            if not packed:
                raise ValueError("ends in a page")
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
            rows = bits[: len(bits) // width * width].reshape(-1, width)
            yield from (rows @ (1 << np.arange(width))).tolist()
            count -= groups


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise ValueError("ends in a page")
    return content
