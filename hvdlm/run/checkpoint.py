"""Checkpoints: folders that exist only when they are whole, and say what they hold.

A checkpoint is `checkpoints/step-00000100/`: one safetensors file a writing rank, `state.json`,
the run's `config.toml` and `tokenizer.json`, and `MANIFEST.json`, which names every tensor's pieces
and every file's size and digest. See docs/formats.md.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from hvdlm.config import EXIT_CRASH, CheckpointConfig, UserError
from hvdlm.data.files import TEMP_PREFIX, fsync, write_atomic
from hvdlm.run.restore import FORMAT, MANIFEST, VERSION, folders, manifest_digest, manifest_text

LATEST = "LATEST"
KEEP = "KEEP"
"""A file in a checkpoint's folder that protects it for good."""

Best: TypeAlias = list[dict[str, Any]]
"""{"step", "val_loss"} of the checkpoints with the smallest validation loss, the best first."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def temp_folder(folder: Path, step: int, attempt: int) -> Path:
    """Where it lies until it is committed."""
    final_folder = step_folder(folder, step)
    return final_folder.with_name(f"{final_folder.name}.tmp-{attempt}")


def rank_best(best: Best, step: int, val_loss: float | None, *, count: int) -> Best:
    """The best checkpoints when that of `step` joins them; of equal ones the older.

    Args:
        best: those before.
        step: of the one to be saved.
        val_loss: its validation loss in nats; None where it was not validated, and then it does not join.
        count: how many to keep.
    """
    if val_loss is None or not math.isfinite(val_loss):
        return best[:count]
    joined = [*best, {"step": step, "val_loss": val_loss}]
    return sorted(joined, key=lambda one: (one["val_loss"], one["step"]))[:count]


def prune(folder: Path, keep: CheckpointConfig, *, best: Best) -> list[Path]:
    """Rename away what need not be kept, so that none is ever half there.

    Args:
        folder: the run's `checkpoints` folder.
        keep: the newest `keep_last`, and those of multiples of `keep_every`; besides, who has a file KEEP.
        best: are kept.

    Returns:
        What is to be deleted.
    """
    doomed = []
    steps = {one["step"] for one in best}
    for old in folders(folder)[: -keep.keep_last]:
        step = int(old.name.partition("-")[2])
        if step in steps or (keep.keep_every and step % keep.keep_every == 0) or (old / KEEP).exists():
            continue
        doomed.append(old.rename(old.with_name(f"{old.name}.tmp-deleted")))
    return doomed


def full_size_bytes(model: nn.Module) -> int:
    """Of a checkpoint: the model and two moments of each trained parameter, fp32."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (sum(values.numel() for values in model.state_dict().values()) + 2 * trained)


def check_space(folder: Path, keep: CheckpointConfig, model: nn.Module) -> None:
    """See that the checkpoints that will lie there at a time fit, beside those that do.

    Args:
        folder: the run's `checkpoints` folder.
        keep: while one is written, `keep_last` others are there; those kept longer are not counted.
        model: of the run.

    Raises:
        UserError: There is too little room, as far as the file system tells: quotas it does not.
    """
    size_bytes = full_size_bytes(model)
    copies = keep.keep_last + 1 - min(len(folders(folder)), keep.keep_last) if keep.every else 1
    found_gib, needed_gib = shutil.disk_usage(folder).free / 2**30, copies * size_bytes / 2**30
    if found_gib < needed_gib:
        raise UserError(
            f"{folder}: {found_gib:.3g} GiB free, needed {needed_gib:.3g} GiB for {copies} checkpoint(s) of "
            f"{size_bytes / 2**30:.3g} GiB; make room, lower checkpoint.keep_last or change train.out",
            EXIT_CRASH,
        )


def make_empty(temp: Path) -> None:
    """Create the folder that a save goes to; what earlier ones left unfinished is deleted.

    Raises:
        UserError: the file system refuses.
    """
    try:
        delete_unfinished(temp.parent)
        temp.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{temp}: cannot be created: {error.strerror}; check the run folder", EXIT_CRASH
        ) from error


def delete_unfinished(folder: Path) -> None:
    """Delete what saves that never came to their end have left.

    Args:
        folder: the run's `checkpoints` folder.
    """
    for stale in folder.glob("step-*.tmp-*"):
        shutil.rmtree(stale)
    # Of LATEST: a kill may come just before it is renamed.
    for stale in folder.glob(f"{TEMP_PREFIX}*"):
        stale.unlink()


def commit(temp: Path, final_folder: Path, written: list[dict[str, Any]]) -> None:
    """Make a folder whose files are all durable a checkpoint: write its manifest and rename it.

    Args:
        temp: the folder.
        final_folder: what it becomes; an older checkpoint of the same step is replaced.
        written: of each rank, its `pieces` (records of `Snapshot`) and `files` (size and digest by name).

    Raises:
        UserError: the file system refuses.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for record in (r for w in written for r in w["pieces"]):
        tensor = tensors.setdefault(
            record["name"], {"shape": record["global_shape"], "dtype": record["dtype"], "pieces": []}
        )
        tensor["pieces"].append(record["piece"])
    files = {name: digest for w in written for name, digest in w["files"].items()}
    manifest = {"format": FORMAT, "version": VERSION, "files": files, "tensors": tensors}
    manifest["digest"] = manifest_digest(manifest)
    write_atomic(temp / MANIFEST, manifest_text(manifest))
    _replace(temp, final_folder)


def _replace(temp: Path, final_folder: Path) -> None:
    """Rename into place; an older checkpoint of the same step is moved away first."""
    old = final_folder.with_name(f"{final_folder.name}.old")
    try:
        if final_folder.exists():
            final_folder.rename(old)
        temp.rename(final_folder)
        fsync(final_folder.parent)
    except OSError as error:
        raise UserError(f"{final_folder}: cannot be committed: {error}", EXIT_CRASH) from error
    shutil.rmtree(old, ignore_errors=True)
    write_atomic(final_folder.parent / LATEST, f"{final_folder.name}\n".encode())
