"""UTF-8 decoded a part at a time: a text of one emoji and 200 MB of letters takes 800 MB as a string."""

from __future__ import annotations

from collections.abc import Iterator

PART_BYTES = 1 << 20


def decoded(raw: bytes | memoryview, errors: str = "strict") -> Iterator[str]:
    """Decode bytes in parts that join to what they are as a whole.

    Args:
        raw: any bytes.
        errors: "strict", or "replace" what is not UTF-8 by U+FFFD.

    Yields:
        Strings, one at least.

    Raises:
        UnicodeDecodeError: its `start` counts from the beginning of all the bytes.
    """
    if len(raw) <= PART_BYTES:
        yield str(raw, "utf-8", errors)
        return
    start, view = 0, memoryview(raw)
    while start < len(view):
        end = _between_characters(view, start + PART_BYTES)
        try:
            text = str(view[start:end], "utf-8", errors)
        except UnicodeDecodeError as error:
            error.start, error.end = error.start + start, error.end + start
            raise
        yield text
        start = end


def _between_characters(raw: memoryview, end: int) -> int:
    """A place at `end`, or up to three bytes before it, that is inside of no character."""
    for place in range(end, end - 4, -1):
        if place >= len(raw) or raw[place] & 0xC0 != 0x80:
            return place
    # The fourth byte of a character, if those were its others, ends it.
    return end
