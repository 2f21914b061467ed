"""Texts that tell two encoders apart, and the comparison of one encoder with another over them.

A tokenizer that was converted, or an encoder that is only faster, is used if it gives the same ids
as the original here. The texts aim at where encoders are known to differ: classes of characters
(one Unicode version or another), combining marks, line ends, runs whose cut is a tie, names of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]

HARD = (
    "",
    " ",
    "plain words, and more words; it's IT'S we'll I'D they've it'\u017f",
    "\x00",
    "a\x00b\x00\x00",
    "line\r\nline\rline\n\n\n",
    "  \t  runs   of \u00a0 white \u3000 space   ",
    "trailing \n \n  ",
    "\r\n\r\n x\n\n  y\n\t\n",
    "def f(self, x=0):\n        return {'a': [1, 22, 333, 4444, 55555]}\n\n\n    # end\n",
    "if (a&&b) { c->d[i++] += 0x7fUL; } // https://example.org/a?b=c%20d#e_f",
    "\u4eba\u4eba\u751f\u800c\u81ea\u7531,\u5728\u5c0a\u4e25\u3002 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 "
    "e\u0301 \u0301 \u0928\u094d\u200d\u093f",
    "\u1100\u1161\u11a8 e\u0301\u0327 a\u0323\u0302 \uff76\uff9e",
    "\ufeffmark \u2028 \u2029 \x85 \x7f \u2581a\u2581\u2581b",
    "\u00dcn\u00efc\u00f6d\u00e9 stra\u00dfe \ufb01ne \u00bd \u2460 \u0130\u0131",
    "<0x0A> <0xE4><0xBD>",
    "x" * 5000,
)
_SCRIPTS = (
    (0x0, 0x3400, 1),
    (0x3400, 0xA000, 37),
    (0xA000, 0xAC00, 1),
    (0xAC00, 0xD7A4, 37),
    (0xD7A4, 0xD800, 1),
    (0xE000, 0xF900, 97),
    (0xF900, 0x10000, 1),
    (0x10000, 0x20000, 3),
    (0x20000, 0x32000, 997),
)
"""First, end, step: every character outside the scripts of thousands of like ones."""
_CHARS_A_TEXT = 64
_RUN_LENGTHS = (2, 3, 5, 16, 33, 64, 70, 200)


def probes(names: Iterable[str] = ()) -> Iterator[str]:
    """Yield the texts: about 2 MB, in a fixed order.

    Args:
        names: of tokens that text may spell.
    """
    yield from HARD
    yield from (char * count for char in map(chr, range(0x20, 0x7F)) for count in _RUN_LENGTHS)
    yield from (f"a {name}b{name} {name}" for name in names)
    chars = [chr(point) for first, end, step in _SCRIPTS for point in range(first, end, step)]
    for start in range(0, len(chars), _CHARS_A_TEXT):
        yield "".join(map(_in_places, chars[start : start + _CHARS_A_TEXT]))


def first_difference(wanted: Encode, found: Encode, texts: Sequence[str]) -> str | None:
    """Find a text that two encoders encode to different ids.

    Args:
        wanted: the original; takes texts, gives one integer array [tokens] for each.
        found: the other.
        texts: in the order in which they are tried.

    Returns:
        The text, or None where all are equal.
    """
    pairs = zip(wanted(texts), found(texts), strict=True)
    return next((text for text, (a, b) in zip(texts, pairs, strict=True) if not np.array_equal(a, b)), None)


def excerpt(text: str) -> str:
    """The start of a text for a message of one line."""
    return ascii(text[:24]) + ("..." if len(text) > 24 else "")


def _in_places(char: str) -> str:
    """A character where its class shows in the cuts around it."""
    return f"a{char}(C {char}\n1{char}11 {char}  b{char}\u0301"
