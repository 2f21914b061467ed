"""What a folder holds before a run: nothing, the same data set, another one, or the rest of a killed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hvdlm.config import UserError
from hvdlm.corpus import stats
from hvdlm.corpus.job import REJECTS_NAME, TOKENIZER_NAME
from hvdlm.corpus.work import Work
from hvdlm.data import manifest as manifests
from hvdlm.data.entries import SPLITS
from hvdlm.data.files import RECORD_NAME, TEMP_PREFIX, write_atomic
from hvdlm.data.manifest import Manifest, read_manifest

TASKS_NAME = "tasks.json"
"""How many training shards each task made."""
_BESIDE = (TASKS_NAME, stats.FILE_NAME, stats.SECONDS_NAME, stats.PLOT_NAME, REJECTS_NAME)
WORK_NAME = f"{TEMP_PREFIX}preprocess"
WORTH_KEEPING = ("hash", "encode")
"""Stages whose results nobody throws away unasked."""


def find_same(folder: Path, record: dict[str, Any], *, force: bool, start: str) -> Manifest | None:
    """Look for a complete data set that was made from the same inputs with the same options.

    Args:
        folder: the output.
        record: what this run makes a data set from.
        force: any data set that another start made may be replaced.
        start: name of this one; an element of a job array may come when the others are done.

    Returns:
        Its manifest, or None where this run has to (and may) make one.

    Raises:
        UserError: the folder holds another or a damaged data set, or files of unknown origin that this one
            would replace.
    """
    has_manifest = (folder / manifests.FILE_NAME).exists()
    before = read_record(folder)
    own = before is not None and stats.read_making(folder).get("start") == start
    if force and not (own and _is_same(before, record)):
        return None
    if not has_manifest:
        # Without a record, but with work begun: killed while another data set was put away.
        if before is None and not _is_same(read_record(folder / WORK_NAME), record):
            _refuse_foreign(folder, record)
        return None
    if before is None:
        raise UserError(
            f"{folder}: holds a data set of unknown origin; choose another --out, or replace it by --force"
        )
    if not _is_same(before, record):
        raise UserError(
            f"{folder}: holds a data set made otherwise ({_difference(before, record)}); "
            "choose another --out, or replace it by --force"
        )
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.file_bytes:
            raise UserError(f"{path}: missing or damaged; make the data set again with --force")
    return manifest


def open_work(folder: Path, work: Work, record: dict[str, Any], *, force: bool) -> None:
    """Go on with the work of an earlier start, or begin it.

    Raises:
        UserError: the work is of a data set made otherwise, and may not be thrown away.
    """
    work.remove_leftovers()
    if not force and is_anothers(work, record):
        before = read_record(work.folder) or {}
        raise UserError(
            f"{folder}: holds unfinished work, begun otherwise ({_difference(before, record)}); "
            "put that back to go on, choose another --out, or begin anew with --force"
        )
    if not _is_same(read_record(work.folder), record):
        work.begin_anew()
        write_record(work.folder, record)


def is_anothers(work: Work, record: dict[str, Any]) -> bool:
    """Whether the work is of a data set made otherwise, and some of it is done.

    Raises:
        GoneError: the data set is complete.
    """
    before = read_record(work.folder)
    if before is None or _is_same(before, record):
        return False
    return any(work.done(stage) for stage in WORTH_KEEPING)


def put_away(folder: Path, into: Path) -> None:
    """Move a data set or the rest of one, the manifest first, so that half of one is never taken for it.

    Its tokenizer stays until the next replaces it: a killed run may have been given that very file.
    Not removed: a process that sleeps in here until others have completed theirs finds no `into` to move to.

    Args:
        folder: of the data set.
        into: a folder of the work that replaces it; made here.

    Raises:
        FileNotFoundError: the work is gone.
    """
    into.mkdir(exist_ok=True)
    names = (manifests.FILE_NAME, RECORD_NAME, *_BESIDE)
    for path in [*(folder / name for name in names), *_shards(folder)]:
        if path.is_file():
            path.rename(into / path.name)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process was writing into the data set."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what the data set is made from.

    Raises:
        UserError: the disk is full.
    """
    write_atomic(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())


def write_tasks(folder: Path, shards: Sequence[int]) -> None:
    """Write how many training shards each task made, so that one can be made again.

    Raises:
        UserError: the disk is full.
    """
    write_atomic(folder / TASKS_NAME, (json.dumps({"train_shards": list(shards)}) + "\n").encode())


def read_tasks(folder: Path) -> list[int] | None:
    """What `write_tasks` wrote; None where there is nothing, or something else."""
    try:
        shards: list[int] = json.loads((folder / TASKS_NAME).read_bytes())["train_shards"]
        return shards if all(type(count) is int and count >= 0 for count in shards) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a data set, or the work on one, is made from; None where it does not say."""
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _refuse_foreign(folder: Path, record: dict[str, Any]) -> None:
    """Refuse to replace files that no data set is known to own."""
    tokenizer = folder / TOKENIZER_NAME
    names = [name for name in _BESIDE if (folder / name).exists()]
    if tokenizer.is_file() and record["tokenizer"] != f"sha256:{sha256(tokenizer.read_bytes()).hexdigest()}":
        names.append(TOKENIZER_NAME)
    names += sorted(path.name for path in _shards(folder))
    if names:
        raise UserError(
            f"{folder}: holds files of unknown origin that would be replaced ({', '.join(names[:3])}); "
            "choose another --out, or replace them by --force"
        )


def _is_same(before: dict[str, Any] | None, record: dict[str, Any]) -> bool:
    return before is not None and _comparable(before) == _comparable(record)


def _shards(folder: Path) -> list[Path]:
    return [path for split in SPLITS for path in folder.glob(f"{split}-[0-9]*.h5")]


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what does not show in the data set: by which words its inputs were named."""
    return {key: value for key, value in record.items() if key != "sources"}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    before, now = _comparable(before), _comparable(now)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    parts = [f"{key} {_short(before.get(key))} then, {_short(now.get(key))} now" for key in keys]
    return "; ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(inner)}" for key, inner in value.items())
    return f"{value!s:.80}"
