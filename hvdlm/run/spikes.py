"""Loss spikes: which loss is too far above those of the steps before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvdlm.parallel.strategy import StepStats

WINDOW = 128
"""Losses of applied steps that a limit is taken from; with fewer there is none."""
_LEAST_SIGMA = 0.01
"""Of the mean: losses that hardly differ must not make the least rise a spike."""


def loss_limit(losses: Sequence[float], sigmas: float) -> float:
    """The largest loss in nats that still updates: mean + `sigmas` standard deviations of the window.

    Rounds correctly, so that all ranks have the same limit.

    Args:
        losses: of the last applied steps, at most `WINDOW`, in nats.
        sigmas: how many; 0 = no limit.

    Returns:
        The limit in nats; infinity where there is none.
    """
    if not sigmas or len(losses) < WINDOW:
        return math.inf
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)
    return mean + sigmas * max(math.sqrt(variance), _LEAST_SIGMA * mean)


def is_spike(stats: StepStats) -> bool:
    """Whether a step updated nothing for its loss: all of it was finite."""
    return stats.skipped and math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)
