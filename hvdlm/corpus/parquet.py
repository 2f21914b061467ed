"""Text columns of Parquet files. pyarrow is imported only where such a file is read: it is large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hvdlm.config import UserError

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20


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
    with _open(path) as file:
        _check_column(path, file.schema_arrow, field)
        metadata = file.metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def read_rows(path: str, field: str, groups: range) -> Iterator[tuple[int, bytes | None, float]]:
    """Read one column of some row groups, a few hundred rows or some megabytes at a time.

    Args:
        path: the file.
        field: name of the column.
        groups: which row groups.

    Yields:
        Row number counted from 1 in the file, the text's bytes or None for null, and the part
        of the row groups' rows read so far.

    Raises:
        UserError: damaged.
    """
    import pyarrow as pa

    with _open(path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        rows, done = sum(file.metadata.row_group(i).num_rows for i in groups), 0
        at_once = _rows_at_once(file.metadata, field, groups)
        try:
            for batch in file.iter_batches(at_once, list(groups), [field], use_threads=False):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes: a text that is not UTF-8 is for the caller's policy, not an exception here.
                for cell in column.cast(pa.large_binary()):
                    row, done = row + 1, done + 1
                    yield row, cell.as_py(), done / rows
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def _rows_at_once(metadata: Any, field: str, groups: range) -> int:
    """Rows of which a batch has some megabytes, by the mean of the row group with the longest."""
    means = [1.0]
    for group in (metadata.row_group(i) for i in groups):
        columns = (group.column(i) for i in range(group.num_columns))
        size_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
        means.append(size_bytes / max(group.num_rows, 1))
    return max(1, min(_ROWS_AT_ONCE, int(_BYTES_AT_ONCE / max(means))))


def _open(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
    return UserError(f"{path}: not a usable Parquet file ({reason:.160}); copy or make it again")


def _check_column(path: str, schema: Any, field: str) -> None:
    if field not in schema.names:
        columns = ", ".join(schema.names[:12]) or "none"
        raise UserError(f"{path}: no column {field!r}; choose with --field one of: {columns}")
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
