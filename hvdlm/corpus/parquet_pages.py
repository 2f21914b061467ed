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
from typing import Any, BinaryIO

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


def read_cells(path: str, chunk: Any, *, optional: bool, scratch: Path) -> Iterator[bytes | None]:
    """The cells of a column in a row group, in order; None for null.

    Args:
        path: the file.
        chunk: pyarrow's metadata of the column there; no page of it has an `obstacle`.
        optional: whether there may be nulls.
        scratch: folder for unpacked pages. They have no names, so nothing is left there.

    Raises:
        OSError, ValueError: the file cannot be read, or is damaged.
        UserError: the disk of `scratch` is full.
    """
    dictionary: BinaryIO = BytesIO()
    ends = np.zeros(0, np.int64)
    with Path(path).open("rb") as file, ExitStack() as stack:
        for page in pages_of(file, chunk):
            content = _unpacked(file, page, chunk.compression, scratch)
            if page.kind == DICTIONARY:
                dictionary = stack.enter_context(content)
                ends = np.fromiter(_ends(content), np.int64, page.values)
                continue
            with content:
                valid = _valid(content, page, optional=optional)
                indexed = page.uses_dictionary
                texts = _found(_places(content), dictionary, ends) if indexed else _in_turn(content)
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
    if page.level_bytes is not None:
        levels = content.read(page.level_bytes)
    elif optional:
        levels = content.read(int.from_bytes(content.read(4), "little"))
    return _hybrid(BytesIO(levels), 1) if optional else repeat(1)


def _places(content: BinaryIO) -> Iterator[int]:
    """The places in the dictionary that a page has instead of texts."""
    width = (content.read(1) or b"\xff")[0]
    if width > 32:
        raise ValueError(f"places in a dictionary of {width} bits")
    return _hybrid(content, width)


def _found(places: Iterator[int], dictionary: BinaryIO, ends: np.ndarray) -> Iterator[bytes]:
    for place in places:
        if place >= len(ends):
            raise ValueError(f"text {place} of a dictionary of {len(ends)}")
        dictionary.seek(int(ends[place - 1]) if place else 0)
        yield _text(dictionary)


def _in_turn(content: BinaryIO) -> Iterator[bytes]:
    while True:
        yield _text(content)


def _text(content: BinaryIO) -> bytes:
    size = int.from_bytes(content.read(4), "little")
    text = content.read(size)
    if len(text) < size:
        raise ValueError("ends in a text")
    return text


def _ends(content: BinaryIO) -> Iterator[int]:
    """Where each text of a dictionary ends."""
    while head := content.read(4):
        yield content.seek(int.from_bytes(head, "little"), os.SEEK_CUR)


def _hybrid(stream: BinaryIO, width: int) -> Iterator[int]:
    """Numbers of `width` bits, in runs of one number or packed by eights, until a ValueError at the end."""
    if width == 0:
        yield from repeat(0)
    while True:
        count, packed = divmod(varint(stream), 2)
        if not packed:
            yield from repeat(int.from_bytes(stream.read(-(-width // 8)), "little"), count)
        while packed and count:
            groups = min(count, _GROUPS_AT_ONCE)
            bits = np.unpackbits(np.frombuffer(stream.read(groups * width), np.uint8), bitorder="little")
            rows = bits[: len(bits) // width * width].reshape(-1, width)
            yield from (rows @ (1 << np.arange(width))).tolist()
            count -= groups
