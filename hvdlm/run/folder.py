"""A run's folder at start-up: is it new, finished, or to be resumed, and may this configuration go on?"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.config import RunConfig, UserError
from hvdlm.config.parse import keys
from hvdlm.run import exit_record, ledger, restore
from hvdlm.run.checkpoint import Best, step_folder
from hvdlm.run.course import Course
from hvdlm.run.no_progress import starts_without_progress
from hvdlm.run.stages import Stage, StageSource, go_on, saved_stages

CHECKPOINTS = "checkpoints"

# What may change when a run goes on; anything else would make it another run. data.path may move
# because the fingerprints of the data sets are compared instead.
_FREE_SECTIONS = ("parallel", "log", "eval", "checkpoint")
_FREE_KEYS = {
    "model.checkpoint_activations",
    "model.compile",
    "train.steps",
    "train.tokens",
    "train.micro_batch",
    "train.out",
    "train.device",
    "train.max_skipped",
    "train.spike_sigmas",
    "train.digest_every",
    "train.stop_margin_s",
    "data.path",
    "data.max_epochs",
    "data.new_stage",
    "data.prefetch",
    "data.verify",
    "data.stage",
}
_SCHEDULE_KEYS = {"train.steps", "train.tokens"}


@dataclass(frozen=True)
class Start:
    """How this attempt begins.

    Attributes:
        attempt: number of this start of the run, from 1.
        checkpoint: folder to load, or '' for a new run.
        step: completed steps in it.
        notes: lines for the user.
        stages: what it draws from, and drew from before.
        course: what else the run carries from step to step.
        best: the checkpoints with the smallest validation loss that are still there.
        parent: the PATH of checkpoint.resume that the run began from, or ''.
        verified: the blocks that earlier attempts found intact, as [[first, end), ...], of each data
            set by its fingerprint.
        starts_without_progress: how many starts before this one, in a row, left no newer checkpoint.
    """

    attempt: int
    checkpoint: str
    step: int
    notes: list[str]
    stages: tuple[Stage, ...]
    course: Course = field(default_factory=Course)
    best: Best = field(default_factory=list)
    parent: str = ""
    verified: dict[str, list[list[int]]] = field(default_factory=dict)
    starts_without_progress: int = 0

    def to_json(self) -> str:
        """For telling other ranks."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Start:
        """What `to_json` returned."""
        record = json.loads(text)
        stages = tuple(Stage.from_record(stage) for stage in record["stages"])
        return Start(**record | {"stages": stages, "course": Course.from_record(record["course"])})


def open_run(
    run_folder: Path,
    *,
    resume: str,
    config: dict[str, Any],
    tokenizer: str,
    sources: tuple[StageSource, ...],
) -> Start:
    """Decide how a run starts; for rank 0.

    Args:
        run_folder: may be missing.
        resume: 'auto', 'never', or the path of a checkpoint that begins the run while it has none.
        config: every knob under its dotted name.
        tokenizer: sha256 of this run's.
        sources: what it is to draw from.

    Returns:
        The attempt's number and what to load.

    Raises:
        UserError: the folder is used and must not be, the checkpoint is damaged, or the
            configuration or the data differ in what must stay; with exit code 93, three starts in a row
            left no newer checkpoint.
    """
    checkpoints = run_folder / CHECKPOINTS
    attempt = max(ledger.attempts(run_folder), exit_record.last_attempt(run_folder)) + 1
    if resume == "never" and (attempt > 1 or restore.folders(checkpoints)):
        raise UserError(
            f"{run_folder}: checkpoint.resume=never, but the folder holds a run; choose another train.out "
            "or delete it"
        )
    folder, notes = _choose(checkpoints, resume)
    if folder is None:
        fruitless = starts_without_progress(run_folder, 0)
        return Start(attempt, "", 0, notes, (Stage(0, sources),), starts_without_progress=fruitless)
    saved = restore.reopen(folder)
    notes += _compare(folder, saved.state, config, tokenizer)
    stages = _stages(saved, sources, config, notes)
    course = Course.from_record(saved.state)
    best = [one for one in saved.state.get("best", []) if step_folder(checkpoints, one["step"]).exists()]
    is_own = folder.parent == checkpoints
    return Start(
        attempt,
        str(folder),
        saved.step,
        notes,
        stages,
        course=course.on_other_data() if stages[-1].first_sample == saved.state["samples"] else course,
        best=best,
        parent=saved.state.get("parent", "") if is_own else str(Path(resume).resolve()),
        verified=_verified(saved.state, sources),
        starts_without_progress=starts_without_progress(run_folder, saved.step),
    )


def discard_empty(run_folder: Path) -> None:
    """Take a run's folder away where there is nothing in it: the run never began."""
    for folder in (run_folder / CHECKPOINTS, run_folder):
        with contextlib.suppress(OSError):
            folder.rmdir()


def make_folder(run_folder: Path) -> None:
    """Create a run's folder where it is missing; for rank 0.

    Raises:
        UserError: the file system refuses.
    """
    try:
        (run_folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{run_folder}: cannot be created: {error.strerror}; choose another train.out"
        ) from error


def _choose(checkpoints: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to load: one's own before a PATH, which is where a run begins once."""
    own, notes = restore.newest_valid(checkpoints)
    if resume in ("auto", "never"):
        return own, notes
    if own is None:
        return restore.open_checkpoint(Path(resume)).folder, notes
    wanted = Path(resume).resolve()
    if wanted in (own.resolve(), checkpoints.parent.resolve()):
        return own, notes
    parent = restore.reopen(own).state.get("parent", "")
    if str(wanted) != parent:
        began = f"began from {parent}" if parent else "began anew"
        raise UserError(
            f"{checkpoints.parent}: holds {own.name} of a run that {began}, not from "
            f"checkpoint.resume={resume}; choose another train.out, or go on with --checkpoint.resume auto"
        )
    return own, notes


def _stages(
    saved: restore.Checkpoint, sources: tuple[StageSource, ...], config: dict[str, Any], notes: list[str]
) -> tuple[Stage, ...]:
    """The run's stages from here on; a note where one begins."""
    sample = saved.state["samples"]
    stages = go_on(
        saved_stages(saved.state),
        sources,
        where=saved.folder,
        sample=sample,
        seed=config["train.seed"],
        new_stage=config["data.new_stage"],
    )
    if stages[-1].first_sample == sample:
        drawn = ", ".join(f"{s.path} weight {s.weight}, drawn {s.drawn:,} times" for s in stages[-1].sources)
        notes.append(f"stage {len(stages)} begins at sample {sample:,}: {drawn}")
    return stages


def _verified(state: dict[str, Any], sources: tuple[StageSource, ...]) -> dict[str, list[list[int]]]:
    """What is known of the sources' blocks: of a copy elsewhere, with the same fingerprint, nothing is."""
    before = {(source.folder, source.fingerprint) for source in saved_stages(state)[-1].sources}
    here = {source.fingerprint for source in sources if (source.folder, source.fingerprint) in before}
    return {key: blocks for key, blocks in state.get("verified", {}).items() if key in here}


def _compare(folder: Path, state: dict[str, Any], config: dict[str, Any], tokenizer: str) -> list[str]:
    """Notes on what changed; an error for what must not. The stages are compared elsewhere."""
    if state["fingerprints"]["tokenizer"] != tokenizer:
        raise UserError(
            f"{folder}: was trained on another tokenizer ({state['fingerprints']['tokenizer'][:12]}, found "
            f"{tokenizer[:12]}); give data.path the data it began with, or another train.out"
        )
    config = json.loads(json.dumps(config))
    # A knob that is younger than the checkpoint had its default.
    defaults = {key: value for key, value in keys(RunConfig()).items() if key in config}
    old = json.loads(json.dumps(defaults)) | state["config"]
    changed = [key for key in sorted(old.keys() | config.keys()) if old.get(key) != config.get(key)]
    frozen = [k for k in changed if k.partition(".")[0] not in _FREE_SECTIONS and k not in _FREE_KEYS]
    if frozen:
        differences = ", ".join(f"{k} was {old.get(k)}, is {config.get(k)}" for k in frozen)
        raise UserError(
            f"{folder}: cannot go on with another configuration: {differences}; "
            "put it back, or choose another train.out"
        )
    return [f"{k} was {old.get(k)}, is {config.get(k)}" for k in changed if k in _SCHEDULE_KEYS]
