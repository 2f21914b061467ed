"""The schedule `plateau`: what it has seen of the validation loss."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.config import OptimConfig


@dataclass(frozen=True)
class Plateau:
    """How far the rate was cut, and why; equal on all ranks.

    Attributes:
        scale: the rate as a part of `optim.lr`.
        best: the smallest validation loss in nats so far; None before there is one.
        bad: validations since the last improvement or cut.
        finished: the rate is `optim.min_lr`, and it did not help either.
    """

    scale: float = 1.0
    best: float | None = None
    bad: int = 0
    finished: bool = False

    def after(self, val_loss: float, optim: OptimConfig) -> Plateau:
        """With one more validation, of this loss in nats; one that is not finite is no improvement."""
        if self.best is None or val_loss < self.best * (1 - optim.plateau_threshold):
            return Plateau(self.scale, val_loss)
        if self.bad + 1 < optim.plateau_patience:
            return Plateau(self.scale, self.best, self.bad + 1)
        if optim.lr * self.scale <= optim.min_lr:
            return Plateau(self.scale, self.best, self.bad + 1, finished=True)
        return Plateau(self.scale * optim.plateau_factor, self.best)
