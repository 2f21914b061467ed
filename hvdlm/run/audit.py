"""Whether a run consumed every sample exactly once, over all its attempts, ranks and stages.

The argument. If the rows of the ledger that count are the steps 1 to N without a gap, and step s has the
samples [(s - 1) G, s G), the run consumed the samples 0 to N G - 1 once each. A stage draws sample after
sample from its sources, and the draws of a source in it follow each other without a gap
(`hvdlm.data.blend`); if each stage begins with the draw at which the stages before it left that source,
the draws of a source over the whole run are 0 to d - 1, once each. Draw i is the window `permute(i mod n)`
of epoch `i div n`, and `permute` is a bijection of 0..n-1 in every epoch: so each whole epoch has every
window once, and the last one none twice. `enumerate_draws` looks instead of arguing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm.config import RunConfig, UserError
from hvdlm.config.parse import load_resolved
from hvdlm.data.blend import first_of, windows_of_samples
from hvdlm.data.loader import BatchPlan, chunks_of
from hvdlm.data.manifest import read_manifest
from hvdlm.data.sources import Source, window_counts
from hvdlm.run.history import History, problem_of_rows, read_history
from hvdlm.run.ledger import FILE_NAME
from hvdlm.run.restore import Checkpoint, open_checkpoint
from hvdlm.run.stages import Stage, drawn_before, saved_stages

_BLOCK_SAMPLES = 1 << 16


@dataclass(frozen=True)
class Reading:
    """How far a source was read: `drawn` of its `windows`, over all stages."""

    path: str
    fingerprint: str
    windows: int
    drawn: int

    @property
    def epochs(self) -> float:
        """How often."""
        return self.drawn / self.windows


@dataclass(frozen=True)
class Recorded:
    """A run as its files have it; `sources` are those of all stages, by fingerprint."""

    checkpoint: Checkpoint
    config: RunConfig
    history: History
    stages: tuple[Stage, ...]
    sources: dict[str, Source]

    @property
    def plan(self) -> BatchPlan:
        """What a step consists of: of its attempts only the micro-batch may have been another."""
        data, train = self.config.data, self.config.train
        return BatchPlan(
            data.seq_len, train.global_batch, train.micro_batch, train.seed, shuffle_mb=data.shuffle_mb
        )

    @property
    def samples(self) -> int:
        """Consumed by its checkpoint."""
        return self.checkpoint.step * self.config.train.global_batch

    def sources_of(self, stage: Stage) -> list[Source]:
        """The data sets of a stage, in its order."""
        return [self.sources[source.fingerprint] for source in stage.sources]


def open_recorded(run: Path, moved: Sequence[Path] = ()) -> Recorded:
    """Read what a run left.

    Args:
        run: Its folder, or a checkpoint in it.
        moved: Where data sets lie that are no longer where the run read them.

    Raises:
        UserError: There is no such run, it has no ledger or no valid checkpoint, or a data set is gone.
    """
    checkpoint = open_checkpoint(run)
    folder = checkpoint.folder.parent.parent
    try:
        history = read_history(folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {FILE_NAME}, so no run folder; name the one that trained") from error
    stages = saved_stages(checkpoint.state)
    return Recorded(
        checkpoint, load_resolved(checkpoint.config_path), history, stages, _find_sources(stages, moved)
    )


def problem_of_run(run: Recorded) -> str | None:
    """The first gap or overlap of what a run consumed, by counting; None if there is none."""
    steps, global_batch = run.checkpoint.step, run.config.train.global_batch
    rows = [*run.history.problems, problem_of_rows(run.history, steps=steps, global_batch=global_batch)]
    for problem in rows:
        if problem:
            return f"{FILE_NAME}: {problem}{_where_it_began(run)}"
    if run.checkpoint.state["samples"] != run.samples:
        found = run.checkpoint.state["samples"]
        return f"{run.checkpoint.folder}: state.json has {found} samples, its {steps} steps are {run.samples}"
    return _problem_of_stages(run)


def readings(run: Recorded) -> list[Reading]:
    """How far each source of the run was read."""
    drawn = drawn_before(run.stages, run.samples, seed=run.plan.seed)
    found = []
    for fingerprint, source in run.sources.items():
        (windows,) = window_counts([source], "train", run.plan.seq_len)
        found.append(Reading(str(source.folder), fingerprint, windows, drawn.get(fingerprint, 0)))
    return found


def enumerate_draws(run: Recorded) -> str | None:
    """Look at the window of every sample: the first that comes twice in an epoch of its source, or a source
    that was drawn from more or less often than it is counted; None if all is right.

    It takes a byte of memory for each window.
    """
    counted = {reading.fingerprint: reading for reading in readings(run)}
    seen = {key: np.zeros(reading.windows, bool) for key, reading in counted.items()}
    drawn = dict.fromkeys(counted, 0)
    ends = [stage.first_sample for stage in run.stages[1:]] + [run.samples]
    for stage, end in zip(run.stages, ends, strict=True):
        for first in range(stage.first_sample, end, _BLOCK_SAMPLES):
            samples = np.arange(first, min(first + _BLOCK_SAMPLES, end))
            for key, windows in _windows(run, stage, samples).items():
                if _mark_(seen[key], drawn[key], windows):
                    return (
                        f"{counted[key].path}: a window comes twice in one epoch, in the samples "
                        f"[{samples[0]}, {samples[-1] + 1})"
                    )
                drawn[key] += len(windows)
    for key, reading in counted.items():
        if drawn[key] != reading.drawn:
            return f"{reading.path}: was drawn from {drawn[key]} times, counted are {reading.drawn}"
    return None


def _windows(run: Recorded, stage: Stage, samples: np.ndarray) -> dict[str, np.ndarray]:
    """The windows that samples are, in their order, of each source by its fingerprint."""
    sources = run.sources_of(stage)
    counts = window_counts(sources, "train", run.plan.seq_len)
    windows = windows_of_samples(
        samples, counts, seed=run.plan.seed, blend=stage.blend, chunks=chunks_of(sources, run.plan)
    )
    first = first_of(counts)
    of = np.searchsorted(first, windows, side="right") - 1
    return {s.fingerprint: windows[of == i] - first[i] for i, s in enumerate(stage.sources)}


def _mark_(seen: np.ndarray, drawn: int, windows: np.ndarray) -> bool:
    """Mark the windows of the next draws of a source, anew in each epoch; whether one was marked before."""
    n, begin = len(seen), 0
    while begin < len(windows):
        left = n - (drawn + begin) % n
        if left == n:
            seen[:] = False
        part = windows[begin : begin + left]
        if seen[part].any() or len(np.unique(part)) < len(part):
            return True
        seen[part] = True
        begin += left
    return False


def _problem_of_stages(run: Recorded) -> str | None:
    """Where a stage does not begin at a resumed step, or not with the draws where those before it ended."""
    global_batch, previous = run.config.train.global_batch, -1
    begins = {0} | {(attempt.resumed_at - 1) * global_batch for attempt in run.history.attempts}
    for number, stage in enumerate(run.stages, 1):
        first = stage.first_sample
        if (number == 1 and first) or not previous < first <= run.samples or first not in begins:
            return f"stage {number} begins at sample {first}, where no attempt of this run began"
        before = drawn_before(run.stages[: number - 1], first, seed=run.plan.seed) if number > 1 else {}
        for source in stage.sources:
            left_at = before.get(source.fingerprint, 0)
            if source.drawn != left_at:
                kind = "overlap" if source.drawn < left_at else "gap"
                return f"stage {number}: {source.path} begins at draw {source.drawn}, not {left_at}: {kind}"
        previous = first
    return None


def _where_it_began(run: Recorded) -> str:
    parent, attempts = run.checkpoint.state.get("parent", ""), run.history.attempts
    if parent and attempts and attempts[0].resumed_at > 1:
        return f"; this run began at step {attempts[0].resumed_at} from {parent}: audit that one for the rest"
    return ""


def _find_sources(stages: Sequence[Stage], moved: Sequence[Path]) -> dict[str, Source]:
    """The data sets of all stages, by fingerprint: in the folders given, else where the run read them."""
    given = {s.manifest.fingerprint: s for s in (Source(folder, read_manifest(folder)) for folder in moved)}
    found: dict[str, Source] = {}
    # A later stage knows today's path.
    for source in (source for stage in reversed(stages) for source in stage.sources):
        key = source.fingerprint
        if key in given:
            found[key] = given[key]
        elif key not in found:
            found[key] = Source(Path(source.path), read_manifest(Path(source.path)))
            other = found[key].manifest.fingerprint
            if other != key:
                raise UserError(
                    f"{source.path}: has data of fingerprint {other[:12]}, the run read {key[:12]} there; "
                    "say by --data.path where that lies now"
                )
    return found
