"""What becomes of bytes that are no text: the policy `--invalid`, and records that are bad."""

from __future__ import annotations

from io import BytesIO

from hvdlm.corpus.plan import MAX_DOCUMENT_BYTES
from hvdlm.text.utf8 import decoded

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


class BadRecordError(ValueError):
    """What is wrong with a record and what to do; whoever knows the place adds it."""


def valid_utf8(raw: bytes | memoryview, invalid: str) -> bytes | None:
    """Bytes that are UTF-8.

    Args:
        raw: of a document or a line.
        invalid: what to do with others: "error", "replace" by U+FFFD, "skip".

    Returns:
        The same bytes where they are valid; None = skip them.

    Raises:
        BadRecordError: they are not valid, or what replaces them is too long for a document.
    """
    try:
        for _ in decoded(raw):
            pass
        return bytes(raw)
    except UnicodeDecodeError as error:
        if invalid == "skip":
            return None
        if invalid == "replace":
            return _replaced(raw)
        kind = next((kind for magic, kind in _MAGIC.items() if bytes(raw[:8]).startswith(magic)), "")
        raise BadRecordError(
            f"not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
            f"{f', it looks like {kind}' if kind else ''}; "
            "convert it, leave it out, or use --invalid replace or skip"
        ) from None


def without_surrogates(text: str, invalid: str) -> bytes | None:
    """UTF-8 of a string out of JSON, which may escape half a character (`\\ud800`): no text can hold that.

    Args:
        text: any string.
        invalid: what to do with such: "error", "replace" by U+FFFD, "skip" (None).

    Raises:
        BadRecordError: it has such.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        if invalid == "skip":
            return None
        if invalid == "replace":
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
        raise BadRecordError(
            "an escape \\ud800 to \\udfff without its other half; use --invalid replace or skip"
        ) from None


def check_length(size_bytes: int) -> None:
    """Refuse a document that is too long.

    Raises:
        BadRecordError: it is.
    """
    if size_bytes > MAX_DOCUMENT_BYTES:
        raise too_long(size_bytes)


def too_long(size_bytes: int) -> BadRecordError:
    """What is wrong with a document of so many bytes."""
    return BadRecordError(
        f"{size_bytes} bytes, at most {MAX_DOCUMENT_BYTES} can be; cut it into shorter ones"
    )


def _replaced(raw: bytes | memoryview) -> bytes:
    joined = BytesIO()  # Parts in a list would be there twice as they are joined.
    for part in decoded(raw, "replace"):
        joined.write(part.encode())
        check_length(joined.tell())
    return joined.getvalue()
