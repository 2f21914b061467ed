"""A run's folder at start-up: is it new, finished, or to be resumed, and may this configuration go on?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.config import UserError
from hvdlm.run import exit_record, ledger, restore

CHECKPOINTS = "checkpoints"

# What may change when a run goes on; anything else would make it another run. data.path may move
# because the data set's fingerprint is compared instead.
_FREE_SECTIONS = ("parallel", "log", "eval", "checkpoint")
_FREE_KEYS = {
    "train.steps",
    "train.tokens",
    "train.micro_batch",
    "train.out",
    "train.device",
    "train.stop_margin_s",
    "data.path",
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
        skipped_in_a_row: steps before this one that updated nothing.
        parent: the PATH of checkpoint.resume that the run began from, or ''.
        verified: the blocks that earlier attempts found intact, as [[first, end), ...], of each data
            set by its fingerprint.
    """

    attempt: int
    checkpoint: str
    step: int
    notes: list[str]
    skipped_in_a_row: int = 0
    parent: str = ""
    verified: dict[str, list[list[int]]] = field(default_factory=dict)

    def to_json(self) -> str:
        """For telling other ranks."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Start:
        """What `to_json` returned."""
        return Start(**json.loads(text))


def open_run(run_folder: Path, *, resume: str, config: dict[str, Any], fingerprints: dict[str, str]) -> Start:
    """Decide how a run starts, and mark its folder as running; for rank 0.

    Args:
        run_folder: created where missing.
        resume: 'auto', 'never', or the path of a checkpoint that begins the run while it has none.
        config: every knob under its dotted name.
        fingerprints: `data` and `tokenizer` of this run.

    Returns:
        The attempt's number and what to load.

    Raises:
        UserError: the folder is used and must not be, the checkpoint is damaged, or the
            configuration or the data differ in what must stay.
    """
    checkpoints = run_folder / CHECKPOINTS
    attempt = max(ledger.attempts(run_folder), exit_record.read(run_folder).get("attempt", 0)) + 1
    if resume == "never" and (attempt > 1 or restore.folders(checkpoints)):
        raise UserError(
            f"{run_folder}: checkpoint.resume=never, but the folder holds a run; choose another train.out "
            "or delete it"
        )
    folder, notes = _choose(checkpoints, resume)
    start = Start(attempt, "", 0, notes)
    if folder is not None:
        saved = restore.reopen(folder)
        notes += _compare(folder, saved.state, config, fingerprints)
        is_own = folder.parent == checkpoints
        start = Start(
            attempt,
            str(folder),
            saved.step,
            notes,
            saved.state.get("skipped_in_a_row", 0),
            saved.state.get("parent", "") if is_own else str(Path(resume).resolve()),
            _verified(saved.state, config),
        )
    _make(run_folder)
    return start


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


def _verified(state: dict[str, Any], config: dict[str, Any]) -> dict[str, list[list[int]]]:
    """What is known of the shards' blocks: of a copy elsewhere, with the same fingerprint, nothing is."""
    if state["config"].get("data.path") != config["data.path"]:
        return {}
    verified: dict[str, list[list[int]]] = state.get("verified", {})
    return verified


def _compare(
    folder: Path, state: dict[str, Any], config: dict[str, Any], fingerprints: dict[str, str]
) -> list[str]:
    """Notes on what changed; an error for what must not."""
    for kind, found in fingerprints.items():
        if state["fingerprints"][kind] != found:
            raise UserError(
                f"{folder}: was trained on another {kind} (fingerprint {state['fingerprints'][kind][:12]}, "
                f"found {found[:12]}); give data.path the data set it began with, or another train.out"
            )
    config = json.loads(json.dumps(config))
    old = state["config"]
    changed = [key for key in sorted(old.keys() | config.keys()) if old.get(key) != config.get(key)]
    frozen = [k for k in changed if k.partition(".")[0] not in _FREE_SECTIONS and k not in _FREE_KEYS]
    if frozen:
        differences = ", ".join(f"{k} was {old.get(k)}, is {config.get(k)}" for k in frozen)
        raise UserError(
            f"{folder}: cannot go on with another configuration: {differences}; "
            "put it back, or choose another train.out"
        )
    return [f"{k} was {old.get(k)}, is {config.get(k)}" for k in changed if k in _SCHEDULE_KEYS]


def _make(run_folder: Path) -> None:
    try:
        (run_folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{run_folder}: cannot be created: {error.strerror}; choose another train.out"
        ) from error
