"""Checkpoints: folders that exist only when they are whole, and say what they hold.

A checkpoint is `checkpoints/step-00000100/`: one safetensors file a writing rank, `state.json`,
the run's `config.toml` and `tokenizer.json`, and `MANIFEST.json`, which names every tensor's pieces
and every file's size and digest. See docs/formats.md.
"""

from __future__ import annotations

import json
import math
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_CRASH, CheckpointConfig, UserError
from hvdlm.data.files import fsync, write_atomic
from hvdlm.parallel.strategy import Piece
from hvdlm.run.restore import FORMAT, MANIFEST, VERSION, file_digest, folders, manifest_digest

LATEST = "LATEST"
KEEP = "KEEP"
"""A file in a checkpoint's folder that protects it for good."""

Best: TypeAlias = list[dict[str, Any]]
"""{"step", "val_loss"} of the checkpoints with the smallest validation loss, the best first."""


def save(
    folder: Path, pieces: Iterable[Piece], world: World, *, state: dict[str, Any], files: dict[str, bytes]
) -> Path:
    """Commit the training state after `state["step"]` completed steps.

    Every rank writes and fsyncs its own pieces into a temporary folder; rank 0 adds the small
    files and the manifest, and renames. Whatever fails before the rename leaves older
    checkpoints as they were.

    Args:
        folder: the run's `checkpoints` folder.
        pieces: this rank's part of the state.
        world: the ranks that save together.
        state: what is not a tensor; needs `step`.
        files: small files to carry, by name.

    Returns:
        The committed folder.

    Raises:
        AgreedError: some rank could not write (a full disk, say); on all ranks.

    Collective: yes.
    """
    final_folder = step_folder(folder, state["step"])
    temp = final_folder.with_name(f"{final_folder.name}.tmp-{state['attempt']}")
    try:
        return _save(temp, pieces, world, state=state, files=files)
    except AgreedError:
        if world.is_root:
            # Half a checkpoint would keep a full disk full.
            shutil.rmtree(temp, ignore_errors=True)
        raise


def _save(
    temp: Path, pieces: Iterable[Piece], world: World, *, state: dict[str, Any], files: dict[str, bytes]
) -> Path:
    final_folder = step_folder(temp.parent, state["step"])
    world.on_root(lambda: _make_empty(temp), name="checkpoint.open")
    written = world.gather_json(_attempt_write(temp, world.rank, pieces), name="checkpoint.written")
    for rank, outcome in enumerate(written):
        if "error" in outcome:
            raise AgreedError(f"rank {rank}: {outcome['error']}", EXIT_CRASH)

    def commit() -> None:
        _write_manifest(temp, written, state, files)
        _replace(temp, final_folder)

    world.on_root(commit, name="checkpoint.commit")
    return final_folder


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


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


def prune(folder: Path, keep: CheckpointConfig, *, best: Best) -> None:
    """Delete what need not be kept; each is renamed away first, so that none is ever half there.

    Args:
        folder: the run's `checkpoints` folder.
        keep: the newest `keep_last`, and those of multiples of `keep_every`; besides, who has a file KEEP.
        best: are kept.
    """
    steps = {one["step"] for one in best}
    for old in folders(folder)[: -keep.keep_last]:
        step = int(old.name.partition("-")[2])
        if step in steps or (keep.keep_every and step % keep.keep_every == 0) or (old / KEEP).exists():
            continue
        doomed = old.with_name(f"{old.name}.tmp-deleted")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def check_space(folder: Path, keep: CheckpointConfig, model: nn.Module) -> None:
    """See that the checkpoints that will lie there at a time fit, beside those that do.

    Args:
        folder: the run's `checkpoints` folder.
        keep: while one is written, `keep_last` others are there; those kept longer are not counted.
        model: of the run; a checkpoint holds it and two moments of each parameter, fp32.

    Raises:
        UserError: There is too little room, as far as the file system tells: quotas it does not.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size_bytes = 4 * (sum(values.numel() for values in model.state_dict().values()) + 2 * trained)
    copies = keep.keep_last + 1 - min(len(folders(folder)), keep.keep_last) if keep.every else 1
    found_gib, needed_gib = shutil.disk_usage(folder).free / 2**30, copies * size_bytes / 2**30
    if found_gib < needed_gib:
        raise UserError(
            f"{folder}: {found_gib:.3g} GiB free, needed {needed_gib:.3g} GiB for {copies} checkpoint(s) of "
            f"{size_bytes / 2**30:.3g} GiB; make room, lower checkpoint.keep_last or change train.out",
            EXIT_CRASH,
        )


def _attempt_write(temp: Path, rank: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write this rank's pieces; a failure is returned, so that the ranks can agree on it."""
    tensors: dict[str, torch.Tensor] = {}
    records = []
    file = f"rank-{rank:05d}.safetensors"
    for piece in pieces:
        key = piece.name if tuple(piece.values.shape) == piece.global_shape else _piece_key(piece)
        tensors[key] = piece.values.detach().cpu().contiguous()
        records.append(
            {
                "name": piece.name,
                "dtype": str(piece.values.dtype).removeprefix("torch."),
                "global_shape": piece.global_shape,
                "piece": {"file": file, "key": key, "offset": piece.offset, "shape": piece.values.shape},
            }
        )
    if not tensors:
        return {"pieces": [], "file": None}
    try:
        save_file(tensors, temp / file)
        # safetensors creates its files for their owner alone, whatever the umask: colleagues who
        # share a run could not resume it.
        (temp / file).chmod(stat.S_IMODE(temp.stat().st_mode) & 0o666)
        fsync(temp / file)
        return {"pieces": records, "file": file, "digest": file_digest(temp / file)}
    except (OSError, SafetensorError) as error:
        return {"error": f"{temp / file}: cannot be written: {error}; free space in the run folder"}


def _piece_key(piece: Piece) -> str:
    return f"{piece.name}@{','.join(map(str, piece.offset))}"


def _write_manifest(
    temp: Path, written: list[dict[str, Any]], state: dict[str, Any], files: dict[str, bytes]
) -> None:
    """The small files, then the manifest that makes the folder a checkpoint."""
    small = {**files, "state.json": (json.dumps(state, indent=1) + "\n").encode()}
    digests = {w["file"]: w["digest"] for w in written if w["file"]}
    for name, content in small.items():
        write_atomic(temp / name, content)
        digests[name] = file_digest(temp / name)
    tensors: dict[str, dict[str, Any]] = {}
    for record in (r for w in written for r in w["pieces"]):
        tensor = tensors.setdefault(
            record["name"], {"shape": record["global_shape"], "dtype": record["dtype"], "pieces": []}
        )
        tensor["pieces"].append(record["piece"])
    manifest = {"format": FORMAT, "version": VERSION, "files": digests, "tensors": tensors}
    manifest["digest"] = manifest_digest(manifest)
    write_atomic(temp / MANIFEST, (json.dumps(manifest) + "\n").encode())


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


def _make_empty(folder: Path) -> None:
    try:
        for stale in folder.parent.glob("step-*.tmp-*"):
            shutil.rmtree(stale)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error}; check the run folder", EXIT_CRASH) from error
