"""The stages of a run: from which sample on it drew from which blend, and how far each source was read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

from hvdlm.config import UserError
from hvdlm.data.blend import Blend, draws_before


@dataclass(frozen=True)
class StageSource:
    """A source in a stage, known by its fingerprint.

    `path` is as the user wrote it, `drawn` counts its draws before the stage, `folder` is where it lies:
    absolute, links resolved ("" = not known).
    """

    path: str
    fingerprint: str
    weight: int
    drawn: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Stage:
    """A blend and the sample that it begins at."""

    first_sample: int
    sources: tuple[StageSource, ...]

    @property
    def blend(self) -> Blend:
        """The stage as the order sees it."""
        return Blend(
            tuple(source.weight for source in self.sources),
            tuple(source.drawn for source in self.sources),
            self.first_sample,
        )

    @staticmethod
    def from_record(record: dict[str, Any]) -> Stage:
        """A stage as state.json has it."""
        return Stage(record["first_sample"], tuple(StageSource(**source) for source in record["sources"]))


def saved_stages(state: dict[str, Any]) -> tuple[Stage, ...]:
    """The stages of a checkpoint, from its state.json."""
    if "stages" in state:
        return tuple(Stage.from_record(record) for record in state["stages"])
    # Written before there were blends.
    only = StageSource(state["config"]["data.path"], state["fingerprints"]["data"], 1)
    return (Stage(0, (only,)),)


def go_on(
    saved: tuple[Stage, ...],
    sources: tuple[StageSource, ...],
    *,
    where: Path,
    sample: int,
    seed: int,
    new_stage: bool,
) -> tuple[Stage, ...]:
    """The stages of a run that goes on.

    Args:
        saved: Of its checkpoint.
        sources: What it is to draw from now; what was drawn before is found here.
        where: The checkpoint, for the message.
        sample: Samples that were consumed.
        seed: Of the order.
        new_stage: Whether another blend is wanted, and no mistake.

    Returns:
        The saved ones, with today's paths, if the blend is that of the last; else one more.

    Raises:
        UserError: The blend is another and `new_stage` is not set.
    """
    last = saved[-1]
    if _shares(last.sources) == _shares(sources):
        both = zip(last.sources, sources, strict=True)
        moved = (replace(old, path=new.path, folder=new.folder) for old, new in both)
        return (*saved[:-1], replace(last, sources=tuple(moved)))
    if not new_stage:
        raise UserError(
            f"{where}: was trained on other data: {_difference(last.sources, sources)}; put data.path back, "
            "choose another train.out, or let a new stage begin here by --data.new_stage true"
        )
    drawn = drawn_before(saved, sample, seed=seed)
    left = (replace(source, drawn=drawn.get(source.fingerprint, 0)) for source in sources)
    return (*saved, Stage(sample, tuple(left)))


def drawn_before(stages: Sequence[Stage], sample: int, *, seed: int) -> dict[str, int]:
    """Draws before a sample of each source that any stage had, by fingerprint."""
    drawn: dict[str, int] = {}
    ends = [stage.first_sample for stage in stages[1:]] + [sample]
    for stage, end in zip(stages, ends, strict=True):
        if stage.first_sample <= sample:
            made = draws_before(min(end, sample), stage.blend, seed=seed)
            drawn |= {source.fingerprint: n for source, n in zip(stage.sources, made, strict=True)}
    return drawn


def check_epochs(
    stages: Sequence[Stage], limits: Sequence[tuple[int, int]], *, steps: int, global_batch: int, seed: int
) -> None:
    """Refuse a run that would read a source of its last stage too often.

    Args:
        stages: Of the run.
        limits: Windows, and epochs that are allowed (0 = any number), of each source of the last stage.
        steps: Optimizer steps in all.
        global_batch: Samples a step.
        seed: Of the order.

    Raises:
        UserError: It would; the message names the source that is used up first, and the largest number of
            steps that is not too many for any.
    """
    most, refusal = steps, ""
    for source, (windows, epochs) in zip(stages[-1].sources, limits, strict=True):

        def drawn_after(step: int, fingerprint: str = source.fingerprint) -> int:
            # Before its first stage a source is not known at all.
            return drawn_before(stages, step * global_batch, seed=seed).get(fingerprint, 0)

        allowed = epochs * windows
        if epochs and drawn_after(most) > allowed:
            most = bisect_left(range(1, most + 1), True, key=lambda step: drawn_after(step) > allowed)
            refusal = (
                f"{source.path}: {steps} steps would read it {drawn_after(steps) / windows:.2f} times, "
                f"data.max_epochs allows {epochs}"
            )
    if refusal:
        raise UserError(
            f"{refusal}; train.steps may be {most} at most: lower it (or train.tokens), raise "
            "data.max_epochs, or give this source less weight"
        )


def _shares(sources: Sequence[StageSource]) -> list[tuple[str, int]]:
    """What makes two blends one: weights 6 and 2 are 3 and 1."""
    divisor = gcd(*(source.weight for source in sources))
    return [(source.fingerprint, source.weight // divisor) for source in sources]


def _difference(old: Sequence[StageSource], new: Sequence[StageSource]) -> str:
    before, after = ({source.fingerprint: source for source in sources} for sources in (old, new))
    had = dict(_shares([source for source in old if source.fingerprint in after]))
    has = dict(_shares([source for source in new if source.fingerprint in before]))
    changes = [
        f"{after[key].path} had weight {before[key].weight}, has {after[key].weight}"
        for key in had
        if had[key] != has[key]
    ]
    changes += [f"{after[key].path} (fingerprint {key[:12]}) is new" for key in after if key not in before]
    changes += [f"{before[key].path} (fingerprint {key[:12]}) is gone" for key in before if key not in after]
    return ", ".join(changes) or "its sources had another order"
