"""What a run carries from step to step besides its tensors; it lies in a checkpoint's state.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hvdlm.config import OptimConfig
from hvdlm.parallel.strategy import StepStats
from hvdlm.run.plateau import Plateau
from hvdlm.run.spikes import WINDOW


@dataclass(frozen=True)
class Course:
    """Equal on all ranks; a run that was stopped goes on with the same.

    Attributes:
        skipped_in_a_row: steps before the next one that updated nothing.
        skipped: all steps that updated nothing.
        losses: of the last steps that did update, at most `spikes.WINDOW`, in nats.
        plateau: what that schedule has seen; all others leave it as it began.
    """

    skipped_in_a_row: int = 0
    skipped: int = 0
    losses: tuple[float, ...] = ()
    plateau: Plateau = field(default_factory=Plateau)

    @staticmethod
    def from_record(state: dict[str, Any]) -> Course:
        """What `to_record` gave, in a state that may be older than one of the fields."""
        return Course(
            state.get("skipped_in_a_row", 0),
            state.get("skipped", 0),
            tuple(state.get("losses", ())),
            Plateau(**state.get("plateau", {})),
        )

    def to_record(self) -> dict[str, Any]:
        """For state.json, and for telling other ranks."""
        return asdict(self)

    def after(self, stats: StepStats) -> Course:
        """With one more step."""
        if stats.skipped:
            return replace(self, skipped_in_a_row=self.skipped_in_a_row + 1, skipped=self.skipped + 1)
        return replace(self, skipped_in_a_row=0, losses=(*self.losses, stats.loss)[-WINDOW:])

    def validated(self, step: int, val_loss: float | None, optim: OptimConfig) -> Course:
        """With one more of the regular validations; those of the warm-up say nothing of the rate."""
        if val_loss is None or optim.schedule != "plateau" or step <= optim.warmup_steps:
            return self
        return replace(self, plateau=self.plateau.after(val_loss, optim))

    def on_other_data(self) -> Course:
        """Where a new blend begins: neither kind of loss can be compared with those before."""
        return replace(self, losses=(), plateau=replace(self.plateau, best=None, bad=0))
