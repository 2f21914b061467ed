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
from hvdlm.corpus.job import REJECTS_NAME, TOKENIZER_NAME, Job
from hvdlm.corpus.options import Options
from hvdlm.corpus.piles import groups, is_whole
from hvdlm.corpus.work import Work
from hvdlm.corpus.write import ShardWriter
from hvdlm.data.entries import ShardEntry, parse_shard
from hvdlm.data.files import publishing, write_atomic
from hvdlm.data.manifest import Manifest, write_manifest

_BEGUN_NAME = "installing"
"""In the work's folder once the output holds nothing but this data set's own files."""
_REPLACED_NAME = "replaced"


@final
class LostError(UserError):
    """What tasks wrote is not there any more, or not whole.

    Attributes:
        tasks: those to do again.
    """

    def __init__(self, folder: Path, tasks: Sequence[int]) -> None:
        found = f"files of {len(tasks)} task(s), the first task {tasks[0]}, were lost or cut short"
        super().__init__(f"{folder}: {found}; run again: only those tasks are done again", EXIT_CRASH)
        self.tasks = tasks


def install(
    out: Path,
    job: Job,
    work: Work,
    encoded: Sequence[dict[str, Any]],
    *,
    record: dict[str, Any],
    making: dict[str, Any],
) -> Manifest:
    """Make a data set of what the tasks left.

    Args:
        out: its folder.
        job: common to all tasks.
        work: where they left it.
        encoded: results of the encode stage, in plan order.
        record: what the data set is made from.
        making: how this time, for seconds.json.

    Returns:
        The manifest as readers will see it.

    Raises:
        UserError: the disk is full; `LostError` where something of the work is missing.
        GoneError: others have completed the data set.
    """
    train = [
        (index, parse_shard(value, job.tokenizer_info, "result of a task"))
        for index, result in enumerate(encoded)
        for value in result["train"]
    ]
    entries = [(f"train-{number:05d}.h5", entry) for number, (_, entry) in enumerate(train)]
    moved = (job.folder / _BEGUN_NAME).exists()
    lost = {
        task
        for (task, entry), (name, _) in zip(train, entries, strict=True)
        if not (_is_there(job.folder / entry.name, entry) or (moved and _is_there(out / name, entry)))
    }
    lost |= {index for index, result in enumerate(encoded) if not _has_val(job, index, result)}
    if lost:
        raise LostError(job.folder, sorted(lost))
    entries += [(f"val-{i:05d}.h5", entry) for i, entry in enumerate(merge_val(job, len(encoded)))]
    _begin(out, job, work, record)
    existing.remove_temporary(out)
    write_atomic(out / TOKENIZER_NAME, (job.folder / TOKENIZER_NAME).read_bytes())
    _join(out / REJECTS_NAME, [rejects_path(job, index) for index in range(len(encoded))])
    stats.write(out, encoded, making)
    existing.write_tasks(out, [len(result["train"]) for result in encoded])
    numbered = [_move(job.folder, out, entry, name) for name, entry in entries]
    return write_manifest(out, numbered, tokenizer=job.tokenizer_info)


def _begin(out: Path, job: Job, work: Work, record: dict[str, Any]) -> None:
    """Put another data set away, once: afterwards what lies in the output was moved there from this work."""
    work.confirm()
    if not (job.folder / _BEGUN_NAME).exists():
        existing.put_away(out, job.folder / _REPLACED_NAME)
        existing.write_record(out, record)
        write_atomic(job.folder / _BEGUN_NAME, b"")


def merge_val(job: Job, tasks: int) -> list[ShardEntry]:
    """Join the validation documents of all tasks, in the order of the plan, to shards in the job's folder.

    Raises:
        UserError: the disk is full.
    """
    writer = ShardWriter(
        job.folder / "val", "val", shard_tokens=job.shard_tokens, tokenizer=job.tokenizer_info
    )
    for index in range(tasks):
        for pile in groups(val_stem(job, index), job.tokenizer.dtype):
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


def _is_there(path: Path, entry: ShardEntry) -> bool:
    try:
        return path.stat().st_size == entry.file_bytes
    except FileNotFoundError:
        return False


def _has_val(job: Job, index: int, result: dict[str, Any]) -> bool:
    said = result["splits"]["val"]
    return is_whole(
        val_stem(job, index), job.tokenizer.dtype, documents=said["documents"], tokens=said["tokens"]
    )


def _move(work: Path, out: Path, entry: ShardEntry, name: str) -> ShardEntry:
    # Where it is not: moved before a crash, or by the process that took this one's place while it slept.
    with suppress(FileNotFoundError):
        (work / entry.name).rename(out / name)
    return replace(entry, name=name)


def _join(target: Path, parts: Sequence[Path]) -> None:
    present = [part for part in parts if part.exists()]
    if not present:
        return
    with publishing(target) as temp, temp.open("xb") as file:
        for part in present:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
