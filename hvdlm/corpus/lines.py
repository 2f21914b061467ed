"""Lines out of plain and compressed files, in bounded memory; and runs of lines."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from io import BytesIO
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from isal import igzip
from isal.igzip_lib import IsalError

from hvdlm.config import UserError
from hvdlm.corpus.plan import MAX_DOCUMENT_BYTES, Piece

_CHUNK_BYTES = _BUFFER_BYTES = 1 << 18
_FEED_BYTES = 1 << 11
"""zstd unpacks what it is fed at once, and four bytes may stand for 128 KiB: 64 MiB at most of these."""


class Line(NamedTuple):
    """Bytes of one or more lines: the first one's number, counted from 1 in the piece, the bytes,
    and how many bytes of the piece are read by then."""

    number: int
    raw: bytes
    done_bytes: int


def read_lines(piece: Piece) -> Iterator[Line]:
    """Read the lines of a piece, their ends included; they end at newlines only.

    A byte-order mark at the start of the file is taken off.

    Args:
        piece: of text or jsonl, plain or compressed.

    Raises:
        UserError: damaged or truncated compressed data, or a file that became shorter.
        OSError: it cannot be read.
    """
    with Path(piece.path).open("rb", buffering=_BUFFER_BYTES) as file:
        file.seek(piece.start)
        number, begun = 1, BytesIO()
        with closing(_DECOMPRESS[piece.kind](file, piece)) as chunks:
            for chunk in _without_mark(chunks) if piece.start == 0 else chunks:
                done_bytes = min(file.tell(), piece.end) - piece.start
                start = 0
                while end := chunk.find(b"\n", start) + 1:
                    if begun.tell() + end - start > MAX_DOCUMENT_BYTES:
                        raise _too_long(piece, number)
                    yield Line(number, _take(begun, chunk[start:end]), done_bytes)
                    number, start = number + 1, end
                begun.write(chunk[start:])
                if begun.tell() > MAX_DOCUMENT_BYTES:
                    raise _too_long(piece, number)
        if begun.tell():
            yield Line(number, _take(begun, b""), piece.size_bytes)


def _take(begun: BytesIO, last: bytes) -> bytes:
    """What was collected and this; the collection is empty afterwards. Much of it is not copied."""
    if not begun.tell():
        return last
    begun.write(last)
    taken = begun.getvalue()
    begun.seek(0)
    begun.truncate()
    return taken


def parts_of(lines: Iterable[Line], document: str, piece: Piece) -> Iterator[Line]:
    """Cut lines into documents, without the line end that each ends with.

    Args:
        lines: with their ends.
        document: "line", or "paragraph": a run of lines that are not blank.
        piece: where they stand.

    Raises:
        UserError: a paragraph that is too long.
    """
    return map(_without_end, lines) if document == "line" else _paragraphs(lines, piece)


def _paragraphs(lines: Iterable[Line], piece: Piece) -> Iterator[Line]:
    # Not a list of lines: those of one letter would take twenty times their bytes.
    group = BytesIO()
    first = done_bytes = 0
    for number, raw, done_bytes in lines:
        if raw and not raw.isspace():
            first = first if group.tell() else number
            group.write(raw)
            if group.tell() > MAX_DOCUMENT_BYTES:
                raise _too_long(piece, first)
        elif group.tell():
            yield _without_end(Line(first, _take(group, b""), done_bytes))
        del raw
    if group.tell():
        yield _without_end(Line(first, _take(group, b""), done_bytes))


def parts_of_text(text: bytes, document: str, piece: Piece) -> Iterator[bytes]:
    """Cut one text in the same way."""
    return map(attrgetter("raw"), parts_of(_split(text), document, piece))


def _split(text: bytes) -> Iterator[Line]:
    number, start = 1, 0
    while end := text.find(b"\n", start) + 1:
        yield Line(number, text[start:end], 0)
        number, start = number + 1, end
    yield Line(number, text[start:], 0)


def number_in_file(piece: Piece, number: int) -> int:
    """The number in the whole file of a line of the piece. For messages only: it reads up to the piece."""
    if piece.start == 0:
        return number
    left = piece.start
    with Path(piece.path).open("rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            number += chunk[:left].count(b"\n")
            left -= len(chunk)
            if left <= 0:
                break
    return number


def without_mark(raw: bytes) -> bytes:
    """Take a UTF-8 byte-order mark off the front."""
    return raw.removeprefix(codecs.BOM_UTF8)


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= len(codecs.BOM_UTF8):
            break
    return chain([without_mark(first)], chunks)


def _without_end(line: Line) -> Line:
    return line._replace(raw=line.raw.removesuffix(b"\n").removesuffix(b"\r"))


def _plain(file: BinaryIO, piece: Piece) -> Generator[bytes, None, None]:
    left = piece.end - piece.start
    while left and (chunk := file.read(min(_CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk
    if left:
        raise UserError(f"{piece.path}: became shorter while it was read; run again when nobody writes to it")


def _gunzip(file: BinaryIO, piece: Piece) -> Generator[bytes, None, None]:
    try:
        with igzip.open(file) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except EOFError:
        raise _damaged(piece, "gzip", "truncated: it ends too early") from None
    except (gzip.BadGzipFile, IsalError) as error:  # type: ignore[misc]
        raise _damaged(piece, "gzip", str(error)) from None


def _unzstd(file: BinaryIO, piece: Piece) -> Generator[bytes, None, None]:
    # Not stream_reader: that takes a truncated frame for a complete one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, fed = decompressor.decompressobj(), False
    try:
        while data := file.read(_FEED_BYTES):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(data)
                data, fed = frame.unused_data, True
    except zstandard.ZstdError as error:
        raise _damaged(piece, "zstd", str(error)) from None
    if fed and not frame.eof:
        raise _damaged(piece, "zstd", "truncated: it ends too early")


def _too_long(piece: Piece, number: int) -> UserError:
    return UserError(
        f"{piece.path}: line {number_in_file(piece, number)}: a document of more than {MAX_DOCUMENT_BYTES} "
        "bytes begins here; cut it into shorter ones"
    )


def _damaged(piece: Piece, kind: str, reason: str) -> UserError:
    return UserError(f"{piece.path}: damaged {kind} data ({reason}); copy or download the file again")


_DECOMPRESS = {"text": _plain, "jsonl": _plain, "jsonl.gz": _gunzip, "jsonl.zst": _unzstd}
