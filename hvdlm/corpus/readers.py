"""Documents out of one piece of the input, one after the other.

Text is decoded exactly: no newline is translated, nothing is normalized; only a byte-order mark at
the start of a file is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus.json_lines import text_of_line
from hvdlm.corpus.lines import Line, number_in_file, parts_of, parts_of_text, read_lines, without_mark
from hvdlm.corpus.parquet import Row, read_rows
from hvdlm.corpus.parquet_pages import TooLong
from hvdlm.corpus.plan import MAX_DOCUMENT_BYTES, Piece
from hvdlm.corpus.policy import BadRecordError, check_length, too_long, valid_utf8


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        field: the key (jsonl) or column (parquet) that holds the text.
        document: "file" (a whole record or file), "paragraph" or "line" of one.
        invalid: what to do with bytes that are not UTF-8: "error", "replace" by U+FFFD, "skip" the document.
    """

    field: str = "text"
    document: str = "file"
    invalid: str = "error"


class Document(NamedTuple):
    """A document, or a record that is none.

    Attributes:
        text: its UTF-8; None where the record was skipped or is bad.
        done_bytes: of the piece, read by then.
        number: its line or row, counted from 1 in the piece or (Parquet) in the file; 0 = the whole file.
        problem: what is wrong with a bad record, and what to do; "" = nothing.
    """

    text: bytes | None
    done_bytes: int
    number: int = 0
    problem: str = ""


def place_of(piece: Piece, document: Document, *, exact: bool = False) -> str:
    """Where a document stands: "line 7", "row 7", or "" for a whole file.

    In a piece that is not the first of its file it is "line 7 after byte 1048576", or, if `exact`, the line
    in the file: then the file is read up to the piece.
    """
    if document.number == 0:
        return ""
    if piece.kind == "parquet":
        return f"row {document.number}"
    if exact:
        return f"line {number_in_file(piece, document.number)}"
    return f"line {document.number}{f' after byte {piece.start}' if piece.start else ''}"


def read_documents(piece: Piece, options: ReadOptions, scratch: Path) -> Iterator[Document]:
    """Read the documents of a piece in order, empty ones and bad records included.

    Args:
        piece: from the plan.
        options: how.
        scratch: folder for what does not fit in memory; nothing is left there.

    Raises:
        UserError: the file cannot be read, is damaged, or was changed since the plan was made.
    """
    try:
        _check_unchanged(piece)
        if piece.kind == "text" and options.document == "file":
            yield _whole_file(piece, options)
        elif piece.kind == "text":
            yield from _parts_of_file(piece, options)
        else:
            records = _records(piece, options, scratch)
            yield from records if options.document == "file" else _parts_of_records(records, piece, options)
        _check_unchanged(piece)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{piece.path}: cannot be read: {reason}; check the file", EXIT_CRASH) from None


def _whole_file(piece: Piece, options: ReadOptions) -> Document:
    raw = without_mark(Path(piece.path).read_bytes())
    return _document(partial(valid_utf8, raw, options.invalid), Document(None, piece.size_bytes))


# What follows maps functions: a generator's variable would keep a document of 200 MB while the next is read.


def _parts_of_file(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    def document_of(part: Line) -> Document:
        return _document(
            partial(valid_utf8, part.raw, options.invalid), Document(None, part.done_bytes, part.number)
        )

    return map(document_of, parts_of(read_lines(piece), options.document, piece))


def _records(piece: Piece, options: ReadOptions, scratch: Path) -> Iterator[Document]:
    def document_of_row(row: Row) -> Document:
        at = Document(None, int(row.done * piece.size_bytes), row.number)
        return _document(partial(_text_of_cell, row.cell, options), at)

    def document_of(line: Line) -> Document:
        at = Document(None, line.done_bytes, line.number)
        return _document(partial(text_of_line, line.raw, options.field, options.invalid), at)

    if piece.kind == "parquet":
        groups = range(piece.start, piece.end)
        rows = read_rows(piece.path, options.field, groups, longest_bytes=MAX_DOCUMENT_BYTES, scratch=scratch)
        return map(document_of_row, rows)
    return map(document_of, filter(lambda line: not line.raw.isspace(), read_lines(piece)))


def _parts_of_records(records: Iterator[Document], piece: Piece, options: ReadOptions) -> Iterator[Document]:
    for record in records:
        if record.text is None:
            yield record
        else:
            for part in parts_of_text(record.text, options.document, piece):
                yield record._replace(text=part)
                del part
        del record


def _document(text_of: Callable[[], bytes | None], at: Document) -> Document:
    """The document at a place: its text, or what is wrong with it."""
    try:
        return at._replace(text=text_of())
    except BadRecordError as error:
        return at._replace(problem=str(error))


def _check_unchanged(piece: Piece) -> None:
    if piece.changed_ns and Path(piece.path).stat().st_mtime_ns != piece.changed_ns:
        raise UserError(f"{piece.path}: was changed while it was read; run again when nobody writes to it")


def _text_of_cell(cell: bytes | memoryview | TooLong | None, options: ReadOptions) -> bytes | None:
    if cell is None:
        raise BadRecordError(f"column {options.field!r} is null, needed a string; remove such rows")
    if isinstance(cell, TooLong):
        raise too_long(cell.size_bytes)
    check_length(len(cell))
    return valid_utf8(cell, options.invalid)
