"""Checkpoints found, checked and read back."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
import xxhash
from safetensors import safe_open
from torch import nn

from hvdlm.config import EXIT_CRASH, UserError

FORMAT = "hvdlm-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@final
@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened for reading.

    Attributes:
        folder: where it lies.
        manifest: the content of MANIFEST.json.
        state: the content of state.json.
    """

    folder: Path
    manifest: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.state["step"])

    def read(
        self,
        name: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        global_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """A rectangle of a saved tensor, put together from the pieces that cover it.

        Args:
            name: canonical name.
            offset: where the rectangle starts.
            shape: of the rectangle.
            global_shape: what the whole tensor must have; None = not compared.

        Raises:
            KeyError: no tensor of this name was saved.
            UserError: the saved tensor has another shape, or its pieces leave a hole.
        """
        saved = self.manifest["tensors"][name]
        if global_shape is not None:
            _check_shape(self.folder, name, saved["shape"], list(global_shape))
        if not _is_inside(saved["shape"], offset, shape):
            raise ValueError(f"{name} {saved['shape']} has no rectangle {shape} at {offset}")
        parts = list(self._parts(saved["pieces"], offset, shape))
        covered = sum(part.numel() for _, part in parts)
        if covered != math.prod(shape):
            raise UserError(
                f"{self.folder}: the pieces of {name} cover {covered} of {math.prod(shape)} elements at "
                f"{offset}: whatever wrote it is wrong; use an older checkpoint"
            )
        if len(parts) == 1:
            return parts[0][1]
        values = torch.empty(shape, dtype=parts[0][1].dtype)
        for target, part in parts:
            values[target] = part
        return values

    def _parts(
        self, pieces: list[dict[str, Any]], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """What each piece has of a rectangle, and where in it that belongs."""
        for piece in pieces:
            source, target = _overlap(piece, offset, shape)
            if source is not None:
                file = self._open(piece["file"])
                key = piece["key"]
                # A scalar has no slices.
                yield target, file.get_slice(key)[source] if source else file.get_tensor(key)

    def load_model_(self, model: nn.Module) -> None:
        """Fill a model of the same shape.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        with torch.no_grad():
            for name, values in model.state_dict().items():
                shape = tuple(values.shape)
                try:
                    values.copy_(self.read(f"model.{name}", (0,) * values.dim(), shape, shape))
                except KeyError as error:
                    raise UserError(f"{self.folder}: holds no {name}: it is of another model") from error

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer the run was trained with."""
        return self.folder / "tokenizer.json"

    @property
    def config_path(self) -> Path:
        """The run's resolved configuration."""
        return self.folder / "config.toml"

    def _open(self, file: str) -> Any:
        return self._files.setdefault(file, safe_open(self.folder / file, framework="pt"))

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}


def folders(checkpoints: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(
        (p for p in checkpoints.iterdir() if _STEP_FOLDER.fullmatch(p.name)),
        key=lambda p: int(p.name.partition("-")[2]),
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest valid one of a run folder.

    Raises:
        UserError: there is none, the named one is damaged, or one cannot be read or is of a newer version.
    """
    if _STEP_FOLDER.fullmatch(path.name) and not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; name one that is there, or the run folder")
    if (path / MANIFEST).exists() or _STEP_FOLDER.fullmatch(path.name):
        problem = find_problem(path)
        if problem:
            raise UserError(f"{path}: damaged checkpoint: {problem}; use an older one")
        return reopen(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; train first: python -m hvdlm.train")
    for folder in reversed(folders(path / "checkpoints")):
        if find_problem(folder) is None:
            return reopen(folder)
    raise UserError(
        f"{path}: no valid checkpoint in {path / 'checkpoints'}; train first: python -m hvdlm.train"
    )


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written.

    Damaged ones that are newer are renamed `.corrupt`; the LATEST file is not asked.

    Returns:
        Its folder or None where no checkpoint was ever committed, and a line for each damaged one.

    Raises:
        UserError: all are damaged, or one cannot be read or is of a newer version.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(folders(checkpoints)):
        problem = find_problem(folder)
        if problem is None:
            return folder, [_set_aside(*one) for one in damaged]
        damaged.append((folder, problem))
    if damaged:
        # Nothing was renamed: else the next start would find no checkpoint, and begin anew unasked.
        folder, problem = damaged[0]
        raise UserError(
            f"{checkpoints}: all {len(damaged)} checkpoint(s) are damaged, the newest so: {folder.name}: "
            f"{problem}; copy one back from a backup, or begin anew in another train.out"
        )
    return None, []


def _set_aside(folder: Path, problem: str) -> str:
    """Rename a damaged checkpoint; the line that says so."""
    names = (folder.with_name(f"{folder.name}.corrupt{i or ''}") for i in itertools.count())
    corrupt = next(name for name in names if not name.exists())
    try:
        folder.rename(corrupt)
    except OSError as error:
        raise UserError(
            f"{folder}: damaged ({problem}) and cannot be renamed: {error.strerror}; delete it"
        ) from error
    return f"{folder}: {problem}; renamed {corrupt.name}"


def find_problem(folder: Path) -> str | None:
    """What is damaged in a checkpoint: every byte of every file is compared; None if nothing.

    Raises:
        UserError: it cannot be read, which may pass, or is of a newer version, which is no damage.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text.decode())
        if manifest["digest"] != manifest_digest(manifest):
            return f"{MANIFEST} was changed after it was written"
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise UserError(
                f"{folder}: is {manifest['format']} {manifest['version']}, this hvdlm reads {FORMAT} "
                f"{VERSION}; use the hvdlm that wrote it, or a newer one"
            )
        if text != manifest_text(manifest):
            # Spaces are not in the digest, and of a name that stands twice only the last is.
            return f"{MANIFEST} is not as it was written"
        for path in sorted(folder.glob("rank-*.safetensors")):
            if path.name not in manifest["files"]:
                return f"{path.name} does not belong to it"
        for name, expected in manifest["files"].items():
            found = file_digest(folder / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, needed {expected['bytes']}"
            if found["xxh3_128"] != expected["xxh3_128"]:
                return f"{name} does not have the content that was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be read: {error.strerror}; check its owner, its permissions "
            "and the file system, then start again",
            EXIT_CRASH,
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3_128 of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def manifest_digest(manifest: dict[str, Any]) -> str:
    """xxh3_128 of a manifest's canonical JSON without its own `digest`."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_text(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written."""
    return (json.dumps(manifest) + "\n").encode()


def reopen(folder: Path) -> Checkpoint:
    """Open a checkpoint that another rank has just checked."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(folder, manifest, state)


def _check_shape(folder: Path, name: str, saved: list[int], needed: list[int]) -> None:
    if saved != needed:
        raise UserError(
            f"{folder}: {name} has shape {saved}, the model needs {needed}: it is a checkpoint of "
            "another model; use the configuration it was trained with, or another train.out"
        )


def _is_inside(saved: list[int], offset: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(saved) == len(offset) == len(shape) and all(
        o >= 0 and o + n <= total for o, n, total in zip(offset, shape, saved, strict=True)
    )


def _overlap(
    piece: dict[str, Any], offset: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...] | None, tuple[slice, ...]]:
    """Where a saved rectangle and a wanted one meet, in the coordinates of each."""
    source, target = [], []
    for o, n, p, m in zip(offset, shape, piece["offset"], piece["shape"], strict=True):
        low, high = max(o, p), min(o + n, p + m)
        if low >= high:
            return None, ()
        source.append(slice(low - p, high - p))
        target.append(slice(low - o, high - o))
    return tuple(source), tuple(target)
