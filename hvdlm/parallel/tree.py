"""Sums over the micro-slots of a step by one fixed binary tree, however the slots lie on ranks.

Level j of the tree has a node for each run [k * 2^j, (k + 1) * 2^j) of the slots 0..S-1, cut off at
S; a node is the sum of its two halves, or its left half where the right one is empty. Rounding
depends on the tree alone, so whoever holds all slots of a node may add them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch

Span: TypeAlias = tuple[int, int]
"""The slots [first, end) of one partial sum, a node of the tree."""

_Value = TypeVar("_Value", float, torch.Tensor)


def push(spans: list[Span], span: Span, slots: int) -> int:
    """Put the next partial sum on a stack of them, and add up what the tree adds up.

    Args:
        spans: the stack, of neighbors in slot order; changed in place.
        span: begins where the last one ends.
        slots: S.

    Returns:
        How many times the two topmost values are to be added.
    """
    spans.append(span)
    additions = 0
    while len(spans) > 1 and _are_halves(spans[-2], spans[-1], slots):
        _, end = spans.pop()
        spans[-1] = (spans[-1][0], end)
        additions += 1
    return additions


def partial_spans(run: range, slots: int) -> list[Span]:
    """The fewest nodes that a run of slots consists of, at most 2 log2(S)."""
    spans: list[Span] = []
    for slot in run:
        push(spans, (slot, slot + 1), slots)
    return spans


def tree_sum(values: Sequence[_Value] | torch.Tensor, spans: Sequence[Span], slots: int) -> _Value:
    """The sum over all slots.

    Args:
        values: the partial sums, numbers or tensors of one shape.
        spans: their slots, in order, all of 0..S-1 together.
        slots: S.
    """
    stack: list[_Value] = []
    open_spans: list[Span] = []
    for value, span in zip(values, spans, strict=True):
        stack.append(value)
        for _ in range(push(open_spans, span, slots)):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    (total,) = stack
    return total


def _are_halves(left: Span, right: Span, slots: int) -> bool:
    """Whether two neighbors are the halves of a node; a left half is never cut off."""
    (first, middle), (_, end) = left, right
    width = 2 * (middle - first)
    return first % width == 0 and end == min(first + width, slots)
