"""The last stage: validation merged, shards numbered and moved into place, the manifest last.

Every step can be done again after a crash: what was moved is found where it belongs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np

from hvdlm.config import EXIT_CRASH, EXIT_USAGE, UserError
from hvdlm.corpus import existing, stats
from hvdlm.corpus.encode import rejects_path, val_stem
from hvdlm.corpus.job import TOKENIZER_NAME, Job
from hvdlm.corpus.options import Options
from hvdlm.corpus.piles import Pile, is_whole
from hvdlm.corpus.write import ShardWriter
from hvdlm.data.entries import ShardEntry, parse_shard
from hvdlm.data.files import publishing
from hvdlm.data.manifest import Manifest, write_manifest

REJECTS_NAME = "rejects.jsonl"


@final
class LostError(UserError):
    """What a task wrote is not there any more, or not whole.

    Attributes:
        task: the one to do again; None = the merge of validation, which every start does again.
    """

    def __init__(self, path: Path, task: int | None) -> None:
        message = f"{path}: was lost or cut short; run again: only what is missing is made"
        super().__init__(message, EXIT_CRASH)
        self.task = task


def install(
    out: Path,
    job: Job,
    encoded: Sequence[dict[str, Any]],
    *,
    record: dict[str, Any],
    making: dict[str, Any],
) -> Manifest:
    """Make a data set of what the tasks left.

    Args:
        out: its folder.
        job: common to all tasks.
        encoded: results of the encode stage, in plan order.
        record: what the data set is made from.
        making: how this time, for seconds.json.

    Returns:
        The manifest as readers will see it.

    Raises:
        UserError: the disk is full; `LostError` where something of the work is missing.
    """
    entries = [
        (parse_shard(value, job.tokenizer_info, "result of a task"), index)
        for index, result in enumerate(encoded)
        for value in result["train"]
    ]
    val = merge_val(job, [result["splits"]["val"] for result in encoded])
    per_task = [len(result["train"]) for result in encoded]
    if not existing.holds_rest_of(out, record):
        existing.remove_data_set(out)
        existing.write_record(out, record)
    _copy(job.folder / TOKENIZER_NAME, out / TOKENIZER_NAME)
    _join(out / REJECTS_NAME, [rejects_path(job, index) for index in range(len(encoded))])
    stats.write(out, encoded, making)
    existing.write_tasks(out, per_task)
    numbered = [
        _move(job.folder, out, entry, f"train-{number:05d}.h5", task)
        for number, (entry, task) in enumerate(entries)
    ]
    numbered += [_move(job.folder, out, entry, f"val-{i:05d}.h5", None) for i, entry in enumerate(val)]
    return write_manifest(out, numbered, tokenizer=job.tokenizer_info)


def merge_val(job: Job, summaries: Sequence[dict[str, Any]]) -> list[ShardEntry]:
    """Join the validation documents of all tasks, in the order of the plan, to shards in the job's folder.

    Args:
        job: common to all tasks.
        summaries: what each task said of its validation documents.

    Raises:
        UserError: the disk is full; `LostError` where a task's documents are not what it said.
    """
    dtype = job.tokenizer.dtype
    for index, said in enumerate(summaries):
        if not is_whole(val_stem(job, index), dtype, documents=said["documents"], tokens=said["tokens"]):
            raise LostError(val_stem(job, index), index)
    writer = ShardWriter(
        job.folder / "val", "val", shard_tokens=job.shard_tokens, tokenizer=job.tokenizer_info
    )
    for index in range(len(summaries)):
        with Pile(val_stem(job, index), dtype) as pile:
            writer.add(pile, np.arange(len(pile.lengths)))
    writer.flush()
    return writer.entries


def refuse_bad(encoded: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse more bad records in all tasks together than are allowed.

    Raises:
        UserError: there are.
    """
    bad = stats.total([result["counts"] for result in encoded])["bad"]
    if bad > options.keep.max_errors:
        raise UserError(
            f"{bad} bad records, allowed are --max-errors {options.keep.max_errors}; they are listed in "
            f"{options.out / existing.WORK_NAME}/rejects-*.jsonl; repair them and begin anew with --force, "
            f"or go on with --max-errors {bad}"
        )


def refuse_empty(encoded: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse a split without documents.

    Raises:
        UserError: one has none.
    """
    documents = {
        split: sum(result["splits"][split]["documents"] for result in encoded) for split in ("train", "val")
    }
    if documents["train"] and documents["val"]:
        return
    found = f"train has {documents['train']} documents, val has {documents['val']}"
    if not documents["train"] and not documents["val"]:
        left_out = stats.total([result["counts"] for result in encoded])
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none at all"
        )
        raise UserError(
            f"{' '.join(options.inputs)}: no documents ({reasons}), so {found}; needed some text in both"
        )
    cure = "give more documents, cut them by --document paragraph or line, or name other inputs by --val"
    if not options.val:
        cure = f"{cure}, or change --val-fraction {options.val_fraction}"
    raise UserError(f"a split is empty: {found}; {cure}", EXIT_USAGE)


def _move(work: Path, out: Path, entry: ShardEntry, name: str, task: int | None) -> ShardEntry:
    source, target = work / entry.name, out / name
    with suppress(FileNotFoundError):
        source.rename(target)
    if not target.exists() or target.stat().st_size != entry.file_bytes:
        raise LostError(source, task)
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
