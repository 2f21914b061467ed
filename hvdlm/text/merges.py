"""The merges of a BPE, found again from the ranks of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

Symbols = TypeVar("Symbols", str, bytes)


def derive(ranks: Mapping[Symbols, int]) -> list[tuple[Symbols, Symbols]]:
    """Find which two tokens each token was merged from, in the order of the ranks.

    Args:
        ranks: token -> rank; lower ones are merged first. A token may be unreachable by merges.

    Returns:
        For a token that the merges before it leave in two parts: those. For one that they leave in
        more (an added token, or one put together by later merges): every two tokens that it can be.

    Source: how a BPE is applied in `tiktoken` and in sentencepiece: of all neighbors that together are
    a token, those of the lowest rank are merged, the leftmost first.
    """
    merges: list[tuple[Symbols, Symbols]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _apply(token, ranks, below=rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        both = [(ranks[a], ranks[b], (a, b)) for a, b in splits if a in ranks and b in ranks]
        merges.extend(pair for _, _, pair in sorted(both))
    return merges


def _apply(token: Symbols, ranks: Mapping[Symbols, int], *, below: int) -> list[Symbols]:
    """A token cut into its symbols, then merged as far as ranks under `below` go."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(candidates)
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
