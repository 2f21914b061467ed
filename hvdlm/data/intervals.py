"""Sets of whole numbers as JSON keeps them: lists of [first, end), for the blocks that were verified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

Intervals: TypeAlias = list[list[int]]
"""[[first, end), ...]; sorted and apart where a function here returns it."""


def merge(intervals: Iterable[Sequence[int]]) -> Intervals:
    """The union of any intervals, in as few as possible."""
    merged: Intervals = []
    for first, end in sorted((first, end) for first, end in intervals if first < end):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([first, end])
    return merged


def gaps(intervals: Iterable[Sequence[int]], count: int) -> Intervals:
    """What of 0..count-1 no interval holds."""
    found, place = [], 0
    for first, end in merge(intervals):
        found.append([place, min(first, count)])
        place = max(place, end)
    return merge([*found, [place, count]])


def size(intervals: Intervals) -> int:
    """How many numbers these intervals hold, which do not overlap."""
    return sum(end - first for first, end in intervals)


def at_positions(intervals: Intervals, positions: range) -> Intervals:
    """The numbers at these positions (step 1), where the numbers of all intervals are counted through."""
    found, before = [], 0
    for first, end in intervals:
        shift = first - before
        found.append([max(first, positions.start + shift), min(end, positions.stop + shift)])
        before += end - first
    return merge(found)


def within(intervals: Intervals, first: int, end: int) -> Iterator[int]:
    """Every number of the intervals in [first, end), in order."""
    for low, high in intervals:
        yield from range(max(low, first), min(high, end))
