"""Text columns of Parquet files. pyarrow is imported only where such a file is read: it is large."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvdlm.config import UserError
from hvdlm.corpus.parquet_headers import HUGE_BYTES, UNUSUAL_BYTES, obstacle, pages_of
from hvdlm.corpus.parquet_pages import TooLong, read_cells

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20
_BUFFER_BYTES = 4 << 20


class Row(NamedTuple):
    """One cell.

    Attributes:
        number: of the row, counted from 1 in the file.
        cell: the text's bytes, where they are few as they lie in pyarrow's memory; None for null;
            `TooLong` where they were not read.
        done: the part of the row groups' rows read so far, 0..1.
    """

    number: int
    cell: bytes | memoryview | TooLong | None
    done: float


def row_group_bytes(path: str, field: str) -> list[int]:
    """Check a file's column and weigh its row groups.

    Args:
        path: the file.
        field: name of the column.

    Returns:
        Uncompressed bytes of each row group.

    Raises:
        UserError: not a Parquet file, without a column of strings of that name, or with one whose pages
            cannot be read in bounded memory.
    """
    with _open(path) as file, _reading(path):
        _check_column(path, file.schema_arrow, field)
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        rows = sum(group.num_rows for group in groups)
        if rows != metadata.num_rows:
            raise _damaged(path, ValueError(f"{metadata.num_rows} rows, its row groups have {rows}"))
        index, optional = _place_of(path, file.schema, field)
        for group in groups:
            # A dictionary and the first texts: a writer makes the others alike. Reading looks at them all.
            _has_huge_pages(path, _column(path, group, index), optional=optional, first=2)
        return [group.total_byte_size for group in groups]


def read_rows(path: str, field: str, groups: range, *, longest_bytes: int, scratch: Path) -> Iterator[Row]:
    """Read one column of some row groups in bounded memory.

    Args:
        path: the file.
        field: name of the column.
        groups: which row groups.
        longest_bytes: of a text; of longer ones the length may be all that is read.
        scratch: folder for what does not fit in memory; nothing is left there.

    Raises:
        UserError: damaged, with pages that cannot be read in bounded memory, or a full disk.
    """
    with _open(path) as file, _reading(path):
        metadata = file.metadata
        index, optional = _place_of(path, file.schema, field)
    counts = [metadata.row_group(i).num_rows for i in range(groups.stop)]
    row, rows, done = sum(counts[: groups.start]), sum(counts[groups.start :]), 0
    for group in groups:
        column, last = _column(path, metadata.row_group(group), index), row + counts[group]
        cells: Iterator[bytes | memoryview | TooLong | None]
        if _has_huge_pages(path, column, optional=optional):
            cells = read_cells(path, column, optional=optional, longest_bytes=longest_bytes, scratch=scratch)
        else:
            at_once = _rows_at_once(counts[group], column.total_uncompressed_size)
            cells = _batches(path, field, group, metadata, at_once)
        with _reading(path):
            for cell in cells:
                row, done = row + 1, done + 1
                yield Row(row, cell, done / rows)
                del cell
        if row != last:
            found = row - last + counts[group]
            raise _damaged(path, ValueError(f"row group {group} has {found} of {counts[group]} rows"))


def _batches(path: str, field: str, group: int, metadata: Any, at_once: int) -> Iterator[memoryview | None]:
    """The cells of one column of a row group, by pyarrow, some rows at a time."""
    import pyarrow as pa

    with _open(path, metadata) as file:
        for batch in file.iter_batches(at_once, [group], [field], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: a text that is not UTF-8 is for the caller's policy, not an exception here.
            yield from _cells(column.cast(pa.large_binary()))


def _place_of(path: str, schema: Any, field: str) -> tuple[int, bool]:
    """A column's place among all, and whether it may have nulls."""
    columns = [schema.column(i) for i in range(len(schema))]
    places = [i for i, column in enumerate(columns) if column.path == field]
    if len(places) != 1:
        raise UserError(f"{path}: {len(places)} columns {field!r}, needed one; rename the others")
    return places[0], columns[places[0]].max_definition_level > 0


def _column(path: str, group: Any, index: int) -> Any:
    """What a row group says of a column. Of no other: pyarrow ends the process at one that is encrypted."""
    if index >= group.num_columns:
        raise _damaged(path, ValueError(f"a row group of {group.num_columns} columns"))
    return group.column(index)


def _has_huge_pages(path: str, column: Any, *, optional: bool, first: int | None = None) -> bool:
    """Whether one of a column's pages, or of the first few, is huge, and not left to pyarrow all the same.

    Raises:
        UserError: it cannot be read in bounded memory.
    """
    if max(column.total_uncompressed_size, column.total_compressed_size) <= HUGE_BYTES:
        return False
    with _reading(path), Path(path).open("rb") as file:
        pages = [*islice(pages_of(file, column), first)]
    if not any(page.is_huge for page in pages):
        return False
    largest = max(pages, key=lambda page: page.size_bytes)
    reasons = (obstacle(page, column.compression, optional=optional) for page in pages)
    reason = next(filter(None, reasons), "")
    if reason and largest.size_bytes > UNUSUAL_BYTES:
        rows = max(1, largest.values * HUGE_BYTES // largest.size_bytes)
        raise UserError(
            f"{path}: a page of column {column.path_in_schema!r} is {reason}; write the file again with "
            f"small pages, by pyarrow: write_table(read_table(FILE), NEW_FILE, row_group_size={rows})"
        )
    return not reason


def _cells(column: Any) -> Iterator[memoryview | None]:
    """The cells of a large_binary array where they lie: pyarrow's own scalars would copy them."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
    content = memoryview(data if data is not None else b"").cast("B")
    for valid, (first, end) in zip(column.is_valid().to_pylist(), pairwise(bounds), strict=True):
        yield content[first:end] if valid else None


def _rows_at_once(rows: int, size_bytes: int) -> int:
    """Rows of which a batch has some megabytes, by their mean in the row group."""
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * rows // max(size_bytes, 1)))


def _open(path: str, metadata: Any = None) -> Any:
    # Read at the first import: arrow's allocator keeps what was freed, half a GB after a long document.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; run: pip install pyarrow") from None
    with _reading(path):
        # By default the compressed column of a whole row group is read at once.
        return pq.ParquetFile(
            path,
            metadata=metadata,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What pyarrow raises becomes one line; names in a footer that are not UTF-8 among it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
    return UserError(f"{path}: not a usable Parquet file ({reason:.160}); copy or make it again")


def _check_column(path: str, schema: Any, field: str) -> None:
    if field not in schema.names:
        columns = ", ".join(schema.names[:12]) or "none"
        raise UserError(f"{path}: no column {field!r}; choose with --field one of: {columns}")
    found = schema.names.count(field)
    if found > 1:
        raise UserError(f"{path}: {found} columns {field!r}, needed one; rename the others")
    if not _is_text(schema.field(field).type):
        columns = ", ".join(column.name for column in schema if _is_text(column.type)) or "none"
        raise UserError(
            f"{path}: column {field!r} holds {schema.field(field).type}, needed strings; choose with --field "
            f"one of: {columns}"
        )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
