"""The learning rate as a function of the step: no state to save, but the scale of `plateau`."""

from __future__ import annotations

import math

from hvdlm.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int, *, scale: float = 1.0) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `steps`.

    Linear warm-up to `lr`, then what `optim.schedule` says, never below `min_lr`.

    Args:
        step: the step to be done.
        optim: the section.
        steps: in all.
        scale: what `plateau` has cut the rate to so far, as a part of `lr`; no other schedule looks at it.

    Source: cosine: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    wsd with a decay of 1 - sqrt: Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations, 2024. inverse_sqrt: Vaswani et al., Attention Is All You Need, 2017.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(1, optim.warmup_steps) / step))
    if optim.schedule == "plateau":
        return max(optim.min_lr, optim.lr * scale)
    return optim.min_lr + (optim.lr - optim.min_lr) * _decayed(step, optim, steps)


def _decayed(step: int, optim: OptimConfig, steps: int) -> float:
    """What is left of the way from `lr` down to `min_lr`: 1 where the decay begins, 0 at the end."""
    begin = optim.warmup_steps
    if optim.schedule == "wsd":
        begin = max(begin, steps - round(optim.decay_fraction * steps))
    progress = min(1.0, max(0, step - begin) / max(1, steps - begin))
    if optim.schedule == "wsd":
        return 1 - math.sqrt(progress)
    return 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
