"""Texts for training a tokenizer, until their different words fill the memory that a trainer may take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import xxhash

DISTINCT_BYTES = 5 << 20
"""UTF-8 bytes of the different words that a tokenizer is trained on: a BPE's trainer takes 90 to 125 times
as much memory, counting words 20 to 50 times."""
_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")
"""About what GPT-2's rule makes words of: letters, digits, or neither."""
_SAMPLED = 16


def until_full(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """Yield texts as long as all their different words together have no more bytes than a limit.

    A trainer keeps every different word, each as a list of symbols: texts in a script without spaces, or
    random letters, would take a hundred times their size. The bytes are estimated from every 16th word
    by hash, so the same texts give the same answer.

    Args:
        texts: any strings; the first one is yielded whatever it holds.
        limit_bytes: UTF-8 bytes of the different words.
    """
    seen: set[int] = set()
    held_bytes = 0
    for place, text in enumerate(texts):
        # Most words occur many times: what white space separates is made a set before the slow rule.
        for word in set(_WORD.findall(" ".join(set(text.split())))):
            raw = word.encode()
            digest = xxhash.xxh3_64_intdigest(raw)
            if digest % _SAMPLED == 0 and digest not in seen:
                seen.add(digest)
                held_bytes += _SAMPLED * len(raw)
        if held_bytes > limit_bytes and place:
            return
        yield text
