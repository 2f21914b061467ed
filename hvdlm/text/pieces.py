"""Where a text may be cut before it is encoded.

A library call on one text of several megabytes takes hundreds of times its size in memory, so a
long text is cut first. The rule is part of shard format version 1: the ids of a long text
differ from those of an uncut encoding at most at these places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from hvdlm.text.utf8 import decoded

PIECE_CHARS = 1 << 20
"""Longest text, in code points, that is handed to the library whole."""
RUN_CHARS = 256
"""Longest word, in code points, that a BPE is trained on."""
_LONG_RUN = re.compile(rf"\S{{{RUN_CHARS + 1},}}|\s{{{RUN_CHARS + 1},}}")


def cut(text: str) -> Iterator[str]:
    """Cut a text longer than `PIECE_CHARS` into pieces that join to the same text.

    A piece ends after the last newline in its first `PIECE_CHARS` code points; without one,
    before the last space in them; without either, after exactly `PIECE_CHARS`.

    Args:
        text: any string.

    Yields:
        One piece at least (the text itself where it is short), none longer than `PIECE_CHARS`.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = _end_of_piece(text, start)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def cut_utf8(raw: bytes) -> Iterator[str]:
    """Cut a text that is there as UTF-8 (see `cut`), of which only some megabytes are decoded at a time.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    left = ""
    for part in decoded(raw):
        left = f"{left}{part}" if left else part
        while len(left) > PIECE_CHARS:
            end = _end_of_piece(left, 0)
            yield left[:end]
            left = left[end:]
    yield left


def _end_of_piece(text: str, start: int) -> int:
    limit = start + PIECE_CHARS
    end = text.rfind("\n", start, limit) + 1
    if end == 0:
        end = text.rfind(" ", start + 1, limit)
    return limit if end == -1 else end


def cut_all(texts: Iterable[str]) -> Iterator[str]:
    """Cut each of many texts (see `cut`)."""
    for text in texts:
        yield from cut(text)


def cut_runs(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts after every `RUN_CHARS` of a longer run of white space, or of anything else.

    For training a BPE only: its trainer takes time quadratic in the length of a word (20 s for
    200,000 equal letters), and words of that length teach it nothing.

    Args:
        texts: any strings.

    Yields:
        Pieces that join to the same texts.
    """
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            for end in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                yield text[start:end]
                start = end
        yield text[start:]


def cut_inside(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cut a text after the first character of every match, overlapping ones included.

    Args:
        text: any string.
        pattern: matches at least one character; what it matches occurs in no piece of the result
            unless it is one character long.

    Returns:
        Pieces that join to the same text.
    """
    cuts = [0]
    while match := pattern.search(text, cuts[-1]):
        cuts.append(match.start() + 1)
    cuts.append(len(text))
    return [text[a:b] for a, b in pairwise(cuts)]
