"""The learning rate as a function of the step: no state to save."""

from __future__ import annotations

import math

from hvdlm.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `steps`.

    Linear warm-up to `lr`, then half a cosine down to `min_lr`, or constant.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress))
