"""Which ranks compute more slowly than the others, and for how long."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import final

_SLOW = 1.3  # Times the median. Ranks of one kind of node differ by a few percent.
_INTERVALS = 3  # In a row: a single slow one may be a neighbor's burst of work.
_SILENT_INTERVALS = 100  # Until a rank that stays slow is named again.


@final
class Stragglers:
    """Follows the ranks' time for a micro-slot over the log intervals."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}
        self._named_at: dict[int, int] = {}
        self._interval = 0

    def look(self, slot_ms: Sequence[float | None]) -> list[int]:
        """Take in one interval.

        Args:
            slot_ms: of each rank in ms; None for one without slots.

        Returns:
            The ranks to name now.
        """
        self._interval += 1
        median = median_ms(slot_ms)
        slow = [rank for rank, ms in enumerate(slot_ms) if ms is not None and ms > _SLOW * median]
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        named = [rank for rank, count in self._slow.items() if count >= _INTERVALS and self._is_due(rank)]
        self._named_at |= dict.fromkeys(named, self._interval)
        return named

    def _is_due(self, rank: int) -> bool:
        return self._interval - self._named_at.get(rank, -_SILENT_INTERVALS) >= _SILENT_INTERVALS


def slowdown(slot_ms: Sequence[float | None]) -> tuple[int, float]:
    """The slowest rank, and its time as a multiple of the median."""
    times = [0.0 if ms is None else ms for ms in slot_ms]
    slowest = times.index(max(times))
    return slowest, times[slowest] / median_ms(slot_ms)


def median_ms(slot_ms: Sequence[float | None]) -> float:
    """The median, and of two in the middle the lower one: of two ranks their mean would hide the slower."""
    return statistics.median_low(ms for ms in slot_ms if ms is not None)
