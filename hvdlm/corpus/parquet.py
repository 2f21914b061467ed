"""Text columns of Parquet files. pyarrow is imported only where such a file is read: it is large."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hvdlm.config import UserError

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20
_BUFFER_BYTES, _LONG_BYTES = 4 << 20, 32 << 20


class Row(NamedTuple):
    """One cell.

    Attributes:
        number: of the row, counted from 1 in the file.
        cell: the text's bytes, where they are few as they lie in pyarrow's memory; None for null.
        done: the part of the row groups' rows read so far, 0..1.
    """

    number: int
    cell: bytes | memoryview | None
    done: float


def row_group_bytes(path: str, field: str) -> list[int]:
    """Check a file's column and weigh its row groups.

    Args:
        path: the file.
        field: name of the column.

    Returns:
        Uncompressed bytes of each row group.

    Raises:
        UserError: not a Parquet file, or without a column of strings of that name.
    """
    with _open(path) as file, _reading(path):
        _check_column(path, file.schema_arrow, field)
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        rows = sum(group.num_rows for group in groups)
        if rows != metadata.num_rows:
            raise _damaged(path, ValueError(f"{metadata.num_rows} rows, its row groups have {rows}"))
        return [group.total_byte_size for group in groups]


def read_rows(path: str, field: str, groups: range) -> Iterator[Row]:
    """Read one column of some row groups, a few hundred rows or some megabytes at a time.

    Args:
        path: the file.
        field: name of the column.
        groups: which row groups.

    Raises:
        UserError: damaged.
    """
    with _open(path) as file:
        metadata = file.metadata
    counts = [metadata.row_group(i).num_rows for i in range(groups.stop)]
    row, rows, done = sum(counts[: groups.start]), sum(counts[groups.start :]), 0
    for group in groups:
        read = 0
        while read < counts[group]:
            cells = _cells_of(path, field, group, skip=read, metadata=metadata)
            cell: bytes | memoryview | None
            for cell in cells:
                row, done, read = row + 1, done + 1, read + 1
                is_long = cell is not None and len(cell) >= _LONG_BYTES
                if cell is not None and is_long:
                    # The reader holds three times as much of it, and what is yielded would keep one of them.
                    cells.close()
                    cell = bytes(cell)
                yield Row(row, cell, done / rows)
                del cell
                if is_long:
                    break
            else:
                if read < counts[group]:
                    raise _damaged(path, ValueError(f"row group {group} has {read} of {counts[group]} rows"))


def _cells_of(
    path: str, field: str, group: int, *, skip: int, metadata: Any
) -> Generator[memoryview | None, None, None]:
    """The cells of one column of a row group from the one after `skip` on."""
    import pyarrow as pa

    with _open(path, metadata) as file, _reading(path):
        at_once = _rows_at_once(metadata, field, group)
        for batch in file.iter_batches(at_once, [group], [field], use_threads=False):
            column = batch.column(0)[skip:]
            skip = max(0, skip - batch.num_rows)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: a text that is not UTF-8 is for the caller's policy, not an exception here.
            yield from _cells(column.cast(pa.large_binary()))


def _cells(column: Any) -> Iterator[memoryview | None]:
    """The cells of a large_binary array where they lie: pyarrow's own scalars would copy them."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
    content = memoryview(data if data is not None else b"").cast("B")
    for valid, (first, end) in zip(column.is_valid().to_pylist(), pairwise(bounds), strict=True):
        yield content[first:end] if valid else None


def _rows_at_once(metadata: Any, field: str, group: int) -> int:
    """Rows of which a batch has some megabytes, by their mean in the row group."""
    own = metadata.row_group(group)
    columns = (own.column(i) for i in range(own.num_columns))
    size_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    return int(max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * own.num_rows // max(size_bytes, 1))))


def _open(path: str, metadata: Any = None) -> Any:
    # Read at the first import: arrow's allocator keeps what was freed, half a GB after a long document.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; run: pip install pyarrow") from None
    with _reading(path):
        # By default the compressed column of a whole row group is read at once.
        return pq.ParquetFile(path, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What pyarrow raises becomes one line; names in a footer that are not UTF-8 among it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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
