from __future__ import annotations

import random

import pytest

from hvdlm.data.intervals import at_positions, gaps, merge, size, within

COUNT = 60


def any_intervals(choose: random.Random) -> list[list[int]]:
    return [
        [first, first + choose.randrange(-1, 9)]
        for first in choose.choices(range(COUNT), k=choose.randrange(9))
    ]


def members(intervals: list[list[int]]) -> set[int]:
    return {number for first, end in intervals for number in range(first, end)}


@pytest.mark.parametrize("seed", range(200))
def test_intervals_are_the_sets_they_stand_for(seed: int) -> None:
    choose = random.Random(seed)
    given = any_intervals(choose)
    merged, rest = merge(given), gaps(given, COUNT)
    assert members(merged) == members(given)
    assert members(rest) == set(range(COUNT)) - members(given)
    assert size(merged) == len(members(given))
    low, high = sorted(choose.choices(range(COUNT + 5), k=2))
    assert list(within(merged, low, high)) == sorted(n for n in members(merged) if low <= n < high)
    assert members(at_positions(merged, range(low, high))) == set(sorted(members(merged))[low:high])
    for intervals in (merged, rest, at_positions(merged, range(low, high))):
        ends = [end for interval in intervals for end in interval]
        assert ends == sorted(set(ends)), "sorted, apart and none empty"


def test_what_was_given_is_not_changed() -> None:
    given = [[0, 2], [2, 4]]
    assert merge(given) == [[0, 4]]
    assert given == [[0, 2], [2, 4]]
