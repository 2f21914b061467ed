"""How far a run is, step by step: what a worker of an elastic run carries from one world to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, final

from hvdlm.parallel.strategy import StepStats, Wish
from hvdlm.run.checkpoint import Best
from hvdlm.run.course import Course


@final
@dataclass
class Progress:
    """Equal on all ranks after the same step.

    Attributes:
        step: completed steps.
        saved_step: that of the newest checkpoint.
        course: with that step.
        best: checkpoints with the smallest validation loss.
        stats: of that step; None before the first one of this start.
        lr: learning rate of that step.
        is_settled: what follows that step (validation, a save) is done.
        rows: of the ledger, of the steps after the newest checkpoint; an elastic run alone keeps them.
    """

    step: int
    saved_step: int
    course: Course
    best: Best
    stats: StepStats | None = None
    lr: float = 0.0
    is_settled: bool = True
    rows: list[dict[str, int]] = field(default_factory=list)

    def took(self, step: int, stats: StepStats, lr: float) -> None:
        """Note one more step."""
        self.step, self.stats, self.lr, self.is_settled = step, stats, lr, False
        self.course = self.course.after(stats)

    def settled(self, course: Course, best: Best) -> None:
        """Note what came of that which follows a step."""
        self.course, self.best, self.is_settled = course, best, True

    def saved(self, step: int) -> None:
        """Note a committed checkpoint."""
        self.saved_step = step
        self.rows = [row for row in self.rows if row["step"] > step]

    def to_record(self) -> dict[str, Any]:
        """For telling other ranks."""
        return asdict(self) | {"course": self.course.to_record()}

    @staticmethod
    def from_record(record: dict[str, Any]) -> Progress:
        """What `to_record` gave, after its way through JSON."""
        stats = record["stats"]
        if stats is not None:
            stats = StepStats(**stats | {"wish": Wish(*stats["wish"])})
        return Progress(**record | {"stats": stats, "course": Course.from_record(record["course"])})
