"""Documents out of one piece of the input, one after the other.

Text is decoded exactly: no newline is translated, nothing is normalized; only a byte-order mark at
the start of a file is taken off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus.lines import number_in_file, parts_of, parts_of_text, read_lines, without_mark
from hvdlm.corpus.parquet import read_rows
from hvdlm.corpus.plan import MAX_DOCUMENT_BYTES, Piece
from hvdlm.text.pieces import cut

_MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip file",
    b"%PDF": "a PDF file",
    b"\x7fELF": "a program",
    b"\x89PNG": "an image",
    b"\x89HDF": "an HDF5 file",
}
_LONG_LINE_BYTES = 1 << 20
_JSON_STARTS = {b"{": "an object", b"[": "a list", b"t": "true or false", b"f": "true or false", b"n": "null"}
_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


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
        text: None where the record was skipped or is bad.
        done_bytes: of the piece, read by then.
        number: its line or row, counted from 1 in the piece or (Parquet) in the file; 0 = the whole file.
        problem: what is wrong with a bad record, and what to do; "" = nothing.
    """

    text: str | None
    done_bytes: int
    number: int = 0
    problem: str = ""


class _BadRecordError(ValueError):
    """What is wrong with a record and what to do; whoever knows the place adds it."""


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


def read_documents(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    """Read the documents of a piece in order, empty ones and bad records included.

    Args:
        piece: from the plan.
        options: how.

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
            for record in _records(piece, options):
                if record.text is None or options.document == "file":
                    yield record
                    continue
                for part in parts_of_text(record.text, options.document, piece):
                    yield record._replace(text=part)
        _check_unchanged(piece)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{piece.path}: cannot be read: {reason}; check the file", EXIT_CRASH) from None


def _whole_file(piece: Piece, options: ReadOptions) -> Document:
    raw = without_mark(Path(piece.path).read_bytes())
    return _document(_decode, raw, options, Document(None, piece.size_bytes))


def _parts_of_file(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    for number, raw, done_bytes in parts_of(read_lines(piece), options.document, piece):
        yield _document(_decode, raw, options, Document(None, done_bytes, number))


def _records(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    if piece.kind == "parquet":
        for row, cell, part in read_rows(piece.path, options.field, range(piece.start, piece.end)):
            yield _document(_text_of_cell, cell, options, Document(None, int(part * piece.size_bytes), row))
        return
    for number, raw, done_bytes in read_lines(piece):
        if not raw.isspace():
            document = _document(_text_of_line, raw, options, Document(None, done_bytes, number))
            del raw  # Of a line of 200 MB this is as much again while its text is encoded.
            yield document


def _document(
    text_of: Callable[[Any, ReadOptions], str | None],
    raw: bytes | memoryview | None,
    options: ReadOptions,
    at: Document,
) -> Document:
    """The document at a place: its text, or what is wrong with it."""
    try:
        return at._replace(text=text_of(raw, options))
    except _BadRecordError as error:
        return at._replace(problem=str(error))


def _check_unchanged(piece: Piece) -> None:
    if piece.changed_ns and Path(piece.path).stat().st_mtime_ns != piece.changed_ns:
        raise UserError(f"{piece.path}: was changed while it was read; run again when nobody writes to it")


def _text_of_cell(raw: memoryview | None, options: ReadOptions) -> str | None:
    if raw is None:
        raise _BadRecordError(f"column {options.field!r} is null, needed a string; remove such rows")
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _BadRecordError(
            f"{len(raw)} bytes, at most {MAX_DOCUMENT_BYTES} can be; cut it into shorter ones"
        )
    return _decode(raw, options)


def _text_of_line(raw: bytes, options: ReadOptions) -> str | None:
    if len(raw) >= _LONG_LINE_BYTES:
        with contextlib.suppress(msgspec.DecodeError, RecursionError, orjson.JSONDecodeError):
            return _text_of_long_line(raw, options)
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError:
        # Slow and tolerant: NaN, unpaired surrogates, bytes that are not UTF-8.
        line = _decode(raw, options)
        if line is None:
            return None
        record = _parse(line)
    field = options.field
    if not isinstance(record, dict):
        found = _JSON_NAMES.get(type(record), "a value")
        raise _BadRecordError(f"found {found}, needed an object with the field {field!r}; repair the line")
    if field not in record:
        fields = ", ".join(f"{name:.40}" for name in list(record)[:12]) or "none"
        raise _BadRecordError(f"no field {field!r}; choose with --field one of: {fields}")
    text = record[field]
    if not isinstance(text, str):
        found = _JSON_NAMES.get(type(text), "a value")
        raise _BadRecordError(f"field {field!r} is {found}, needed a string; choose another --field")
    return _without_surrogates(text, options)


def _text_of_long_line(raw: bytes, options: ReadOptions) -> str | None:
    """As for any line, but its other fields are passed over: as objects they take 30 times their bytes.

    Raises:
        DecodeError, RecursionError, JSONDecodeError: it takes the tolerant parser.
    """
    value = _decoder(options.field).decode(raw).value
    if value is msgspec.UNSET:
        raise _BadRecordError(f"no field {options.field!r}; choose another --field")
    if bytes(memoryview(value)[:1]) == b'"':
        return _without_surrogates(orjson.loads(memoryview(value)), options)
    found = _JSON_STARTS.get(bytes(memoryview(value)[:1]), "a number")
    raise _BadRecordError(f"field {options.field!r} is {found}, needed a string; choose another --field")


@cache
def _decoder(field: str) -> msgspec.json.Decoder[Any]:
    only = [("value", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)]
    return msgspec.json.Decoder(msgspec.defstruct("Record", only, rename={"value": field}))


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise _BadRecordError(f"not JSON ({reason}); needed one object a line; repair the line") from None


def _decode(raw: bytes | memoryview, options: ReadOptions) -> str | None:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        if options.invalid == "skip":
            return None
        if options.invalid == "replace":
            return str(raw, "utf-8", "replace")
        kind = next((kind for magic, kind in _MAGIC.items() if bytes(raw[:8]).startswith(magic)), "")
        raise _BadRecordError(
            f"not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
            f"{f', it looks like {kind}' if kind else ''}; "
            "convert it, leave it out, or use --invalid replace or skip"
        ) from None


def _without_surrogates(text: str, options: ReadOptions) -> str | None:
    """JSON may escape half a character (`\\ud800`): no UTF-8 text can hold that."""
    try:
        for piece in cut(text):
            piece.encode()
        return text
    except UnicodeEncodeError:
        if options.invalid == "skip":
            return None
        if options.invalid == "replace":
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raise _BadRecordError(
            "an escape \\ud800 to \\udfff without its other half; use --invalid replace or skip"
        ) from None
