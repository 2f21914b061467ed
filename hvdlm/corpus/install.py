"""The last stage: validation merged, shards numbered and moved into place, the manifest last.

Every step can be done again after a crash: what was moved is found where it belongs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.config import UserError
from hvdlm.corpus import existing, stats
from hvdlm.corpus.encode import rejects_path, val_stem
from hvdlm.corpus.job import TOKENIZER_NAME, Job
from hvdlm.corpus.piles import Pile
from hvdlm.corpus.write import ShardWriter
from hvdlm.data.entries import ShardEntry, parse_shard
from hvdlm.data.files import publishing
from hvdlm.data.manifest import Manifest, write_manifest

REJECTS_NAME = "rejects.jsonl"


def install(
    out: Path,
    job: Job,
    encoded: Sequence[dict[str, Any]],
    *,
    record: dict[str, Any],
    seconds: dict[str, float],
) -> Manifest:
    """Make a data set of what the tasks left.

    Args:
        out: its folder.
        job: common to all tasks.
        encoded: results of the encode stage, in plan order.
        record: what the data set is made from.
        seconds: of each stage, for stats.json.

    Returns:
        The manifest as readers will see it.

    Raises:
        UserError: the disk is full, or a shard of the work is missing.
    """
    train = [
        parse_shard(value, job.tokenizer_info, "result of a task")
        for result in encoded
        for value in result["train"]
    ]
    entries = [*train, *merge_val(job, len(encoded))]
    per_task = [len(result["train"]) for result in encoded]
    if not existing.holds_rest_of(out, record):
        existing.remove_data_set(out)
        existing.write_record(out, record)
    _copy(job.folder / TOKENIZER_NAME, out / TOKENIZER_NAME)
    _join(out / REJECTS_NAME, [rejects_path(job, index) for index in range(len(encoded))])
    stats.write(out, encoded, seconds)
    existing.write_tasks(out, per_task)
    numbered: list[ShardEntry] = []
    for split in ("train", "val"):
        for number, entry in enumerate(entry for entry in entries if entry.split == split):
            numbered.append(_move(job.folder, out, entry, f"{split}-{number:05d}.h5"))
    return write_manifest(out, numbered, tokenizer=job.tokenizer_info)


def merge_val(job: Job, tasks: int) -> list[ShardEntry]:
    """Join the validation documents of all tasks, in the order of the plan, to shards in the job's folder.

    Raises:
        UserError: the disk is full.
    """
    writer = ShardWriter(
        job.folder / "val", "val", shard_tokens=job.shard_tokens, tokenizer=job.tokenizer_info
    )
    for index in range(tasks):
        with Pile(val_stem(job, index), job.tokenizer.dtype) as pile:
            writer.add(pile, np.arange(len(pile.lengths)))
    writer.flush()
    return writer.entries


def _move(work: Path, out: Path, entry: ShardEntry, name: str) -> ShardEntry:
    source, target = work / entry.name, out / name
    if source.exists():
        source.rename(target)
    elif not target.exists() or target.stat().st_size != entry.file_bytes:
        raise UserError(f"{source}: is missing; begin anew with --force")
    return replace(entry, name=name)


def _copy(source: Path, target: Path) -> None:
    with publishing(target) as temp:
        shutil.copyfile(source, temp)


def _join(target: Path, parts: Sequence[Path]) -> None:
    present = [part for part in parts if part.exists()]
    if not present:
        return
    with publishing(target) as temp, temp.open("xb") as file:
        for part in present:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
