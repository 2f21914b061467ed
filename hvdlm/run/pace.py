"""When a checkpoint is due by the clock, from what checkpoints cost and how often a machine fails."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import final

from hvdlm.run.standing import SaveCost, best_interval_s, cost_of

_UNKNOWN = SaveCost(stall_s=30.0, write_s=0.0)
"""Until the first checkpoint of an attempt has shown what it costs."""


@final
class Pace:
    """Asks for a checkpoint whenever `best_interval_s` has passed since the last one began.

    Rank 0's alone counts: what it asks for reaches the others with the step's statistics.

    Args:
        mtbf_s: mean time between failures in seconds; 0 = never ask.
    """

    def __init__(self, mtbf_s: float) -> None:
        self._mtbf_s = mtbf_s
        self._cost = _UNKNOWN
        self._began_s = time.monotonic()

    @property
    def due(self) -> bool:
        """A checkpoint would lose less than going on without."""
        since_s = time.monotonic() - self._began_s
        return self._mtbf_s > 0 and since_s >= best_interval_s(self._cost, self._mtbf_s)

    def begin(self) -> None:
        """A checkpoint begins, for whatever reason."""
        self._began_s = time.monotonic()

    def committed(self, seconds: Mapping[str, float]) -> None:
        """It is done, and took these `Saved.seconds`."""
        self._cost = cost_of(seconds)
