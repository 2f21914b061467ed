"""What stands before each page of a Parquet column: pyarrow does not tell, and a page may be of any size.

Source: parquet.thrift of Apache Parquet (PageHeader and what it holds); Thrift's compact protocol.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
"""Kinds of pages (PageType) that hold something; others are passed over."""
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
UNCOMPRESSED, SNAPPY = "UNCOMPRESSED", "SNAPPY"
# Not LZ4: two formats have that name.
CODECS = (UNCOMPRESSED, SNAPPY, "GZIP", "BROTLI", "ZSTD")
"""How a huge page may be compressed, in pyarrow's words."""
HUGE_BYTES = 32 << 20
"""Of a page, compressed or not: more is huge."""
UNUSUAL_BYTES = 96 << 20
"""Of a page that only pyarrow can read: it takes some five times as much memory."""
MAX_HELD_BYTES = 720 << 20
"""Of a huge page in memory; the rest of the process has 90 MiB, 220 once it has trained a tokenizer."""
_WINDOW_BYTES = 128 << 20
MAX_DICTIONARY_TEXTS = 4 << 20
"""Of a huge dictionary: where each ends is kept in memory."""
_DEPTH = 8
_DAMAGED = "the header of a page is damaged"


class Page(NamedTuple):
    """A page of a column.

    Attributes:
        kind: `DATA`, `DICTIONARY` or `DATA_V2`.
        start: byte of the file where its content begins.
        packed_bytes: of its content in the file.
        unpacked_bytes: of its content.
        crc: CRC-32 of its content in the file, where the writer gave one.
        values: how many it has, nulls included.
        level_bytes: at the front of the content, never compressed; None = levels are among the content.
        is_compressed: whether the rest of the content is.
        uses_dictionary: whether its values are places in the dictionary.
        is_usual: whether it is encoded in one of the two ways that `parquet_pages` reads.
        has_usual_levels: whether what says where nulls are is, too.
    """

    kind: int
    start: int
    packed_bytes: int
    unpacked_bytes: int
    crc: int | None
    values: int
    level_bytes: int | None
    is_compressed: bool
    uses_dictionary: bool
    is_usual: bool
    has_usual_levels: bool

    @property
    def size_bytes(self) -> int:
        """Of its content, compressed or not."""
        return max(self.packed_bytes, self.unpacked_bytes)

    @property
    def is_huge(self) -> bool:
        """Whether pyarrow shall not read it."""
        return self.size_bytes > HUGE_BYTES


def pages_of(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """The pages of a column in a row group.

    Args:
        file: whose headers are read, and nothing else.
        chunk: pyarrow's metadata of the column there.

    Raises:
        ValueError: something else stands where a header should.
    """
    # As in pyarrow: with some writers the first page is the dictionary, whatever the footer says.
    at, left = chunk.data_page_offset, chunk.num_values
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    while left > 0:
        file.seek(at)
        try:
            page = _page(_struct(file, _DEPTH), file.tell())
        except (AttributeError, TypeError, OverflowError):
            # A number where a struct should be, or the other way round; too far to seek.
            raise ValueError(_DAMAGED) from None
        at = page.start + page.packed_bytes
        if page.kind in (DATA, DATA_V2):
            left -= page.values
        if page.kind in (DATA, DICTIONARY, DATA_V2):
            yield page


def obstacle(page: Page, codec: str, *, optional: bool) -> str:
    """Why a page cannot be read in bounded memory: what it is and what was needed; "" = it can.

    Args:
        page: of a text column.
        codec: its compression, in pyarrow's words.
        optional: whether the column may have nulls; with some writers others have levels of a kind by name.
    """
    if codec not in CODECS:
        return f"compressed by {codec}, needed {', '.join(CODECS[1:])} or nothing"
    if not page.is_usual or (optional and not page.has_usual_levels):
        return "encoded in an unusual way, needed plain texts or a dictionary"
    window_bytes = page.unpacked_bytes if codec == SNAPPY else 0 if codec == UNCOMPRESSED else _WINDOW_BYTES
    held_bytes = page.packed_bytes + min(window_bytes, page.unpacked_bytes)
    if held_bytes > MAX_HELD_BYTES:
        return f"{held_bytes >> 20} MiB in memory, needed {MAX_HELD_BYTES >> 20} or less"
    if page.kind == DICTIONARY and page.values > MAX_DICTIONARY_TEXTS:
        return f"a dictionary of {page.values} texts, needed {MAX_DICTIONARY_TEXTS} or fewer"
    return ""


def varint(file: BinaryIO) -> int:
    """An unsigned number of 7 bits a byte, the lowest first.

    Raises:
        ValueError: the file ends, or the number has more than 64 bits.
    """
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128 and value < 1 << 64:
            return value
    raise ValueError("a number of more than 64 bits")


def _page(fields: dict[int, Any], start: int) -> Page:
    kind, unpacked, packed = (fields.get(number, -1) for number in (1, 2, 3))
    own = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, 0), {})
    values = own.get(1, -1) if kind in (DATA, DICTIONARY, DATA_V2) else 0
    level_bytes = own.get(5, 0) + own.get(6, 0) if kind == DATA_V2 else None
    numbers = (kind, unpacked, packed, values)
    if min(numbers) < 0 or max(numbers) >= 1 << 31 or not 0 <= (level_bytes or 0) <= min(packed, unpacked):
        raise ValueError(_DAMAGED)
    crc, encoding = fields.get(4), own.get(4 if kind == DATA_V2 else 2)
    return Page(
        kind,
        start,
        packed,
        unpacked,
        None if crc is None else crc & 0xFFFFFFFF,
        values,
        level_bytes,
        is_compressed=kind != DATA_V2 or own.get(7, True),
        uses_dictionary=kind != DICTIONARY and encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY),
        is_usual=encoding in (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY),
        has_usual_levels={DATA: own.get(3) == _RLE, DATA_V2: own.get(6, 0) == 0}.get(kind, True),
    )


def _struct(file: BinaryIO, depth: int) -> dict[int, Any]:
    """A struct of the compact protocol: numbers and structs by the numbers of their fields."""
    fields, number = dict[int, Any](), 0
    while head := _byte(file):
        number = number + (head >> 4) if head >> 4 else _signed(file)
        if not 0 < number < 1 << 15:
            raise ValueError(_DAMAGED)
        fields[number] = _value(file, head & 15, depth)
    return fields


def _value(file: BinaryIO, kind: int, depth: int) -> Any:
    """A value of a kind; None for those that no header of a page needs."""
    if depth == 0 or not 0 < kind < 14:
        raise ValueError(_DAMAGED)
    if kind in (1, 2):
        return kind == 1
    if kind in (4, 5, 6):
        return _signed(file)
    if kind == 12:
        return _struct(file, depth - 1)
    if kind in (9, 10):
        head = _byte(file)
        for _ in range(head >> 4 if head >> 4 < 15 else varint(file)):
            _element(file, head & 15, depth - 1)
    elif kind == 11:
        count = varint(file)
        kinds = _byte(file) if count else 0
        for _ in range(count):
            _element(file, kinds >> 4, depth - 1)
            _element(file, kinds & 15, depth - 1)
    else:
        # Texts, such as the least and the greatest, may be long.
        file.seek({3: 1, 7: 8, 13: 16}.get(kind) or varint(file), os.SEEK_CUR)
    return None


def _element(file: BinaryIO, kind: int, depth: int) -> None:
    """One of a list, a set or a map, where a bool has a byte."""
    if kind in (1, 2):
        _byte(file)
    else:
        _value(file, kind, depth)


def _signed(file: BinaryIO) -> int:
    value = varint(file)
    return (value >> 1) ^ -(value & 1)


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("ends in a page")
    return byte[0]
