"""Damaged shards made again from their source, as `preprocess` made them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from hvdlm.config import UserError
from hvdlm.corpus import crew as crews
from hvdlm.corpus import existing, hold, stats
from hvdlm.corpus.build import find_duplicates, job_of, plan_of
from hvdlm.corpus.encode import encode_task, refuse_write
from hvdlm.corpus.install import merge_val
from hvdlm.corpus.job import TOKENIZER_NAME, Job, Report
from hvdlm.corpus.options import Options, Source, from_record, look_up, record
from hvdlm.corpus.pool import Team
from hvdlm.corpus.progress import Progress
from hvdlm.corpus.work import Work
from hvdlm.data.entries import ShardEntry, parse_shard
from hvdlm.data.files import RECORD_NAME, TEMP_PREFIX, fsync, unwritable
from hvdlm.data.manifest import Manifest
from hvdlm.text import fast

_WORK_NAME = f"{TEMP_PREFIX}repair"


def repair(folder: Path, manifest: Manifest, names: Collection[str], *, workers: int) -> None:
    """Make some shards of a data set again.

    A shard for training costs its task, one for validation costs all of them. A shard is replaced
    only by one of exactly the bytes that the manifest tells.

    Args:
        folder: the data set.
        manifest: its manifest.
        names: files of damaged shards.
        workers: processes.

    Raises:
        UserError: the source is not there any more or has changed, the data set was not made by
            `preprocess`, its tokenizer is damaged, or a shard comes out with other bytes.
    """
    if TOKENIZER_NAME in names:
        raise UserError(
            f"{folder / TOKENIZER_NAME}: is damaged; copy it from another data set or a run folder"
        )
    crew = crews.alone()
    with hold.claimed(folder, existing.WORK_NAME, wait=False, crew=crew):
        shutil.rmtree(folder / _WORK_NAME, ignore_errors=True)
        try:
            work = Work(folder / _WORK_NAME, crew, lambda: False)
        except OSError as error:
            refuse_write(folder, error)
        try:
            with work:
                entries = _make(folder, manifest, work, names, workers)
            for entry in manifest.shards:
                if entry.name in names:
                    _replace(work.folder, folder, entry, entries.get(entry.name))
            fsync(folder)
        finally:
            work.remove()


def _make(
    folder: Path, manifest: Manifest, work: Work, names: Collection[str], workers: int
) -> dict[str, ShardEntry]:
    """Make the shards in the work's folder: their entries there, by their names in the data set."""
    options, source = _made_from(folder)
    job, tasks = job_of(options, work.folder), plan_of(options, source)
    per_task = existing.read_tasks(folder) or []
    if (len(per_task), sum(per_task)) != (len(tasks), len(manifest.split("train"))):
        raise UserError(
            f"{folder / existing.TASKS_NAME}: is damaged, or of another source (tells of {len(per_task)} "
            f"tasks and {sum(per_task)} shards, there are {len(tasks)} and {len(manifest.split('train'))}); "
            "copy it again, or preprocess again with --force"
        )
    job.write_plan(tasks)
    shutil.copyfile(folder / TOKENIZER_NAME, work.folder / TOKENIZER_NAME)
    # Without the very encoder the reference does as well: the bytes are compared.
    choice = stats.read_making(folder).get("encoder")
    if isinstance(choice, dict) and fast.can_follow(choice):
        job.write_choice(choice)
    ends = list(accumulate(per_task))
    chosen = _tasks_of(names, ends)
    with Progress(work, shows=True) as progress, Team(work, job, workers=workers, report=progress) as team:
        if job.keep.dedup:
            find_duplicates(job, work, team, progress, count=len(tasks), total_bytes=0)
        progress.stage("encode", count=len(chosen), total_bytes=sum(tasks[i].size_bytes for i in chosen))
        team.run("encode", partial(_encode_chosen, chosen=chosen), len(chosen))
    entries: dict[str, ShardEntry] = {}
    for place, index in enumerate(chosen):
        first = ends[index] - per_task[index]
        for offset, value in enumerate(work.result("encode", place)["train"]):
            entry = parse_shard(value, job.tokenizer_info, "result of a task")
            entries[f"train-{first + offset:05d}.h5"] = entry
    if any(name.startswith("val-") for name in names):
        entries |= {f"val-{i:05d}.h5": entry for i, entry in enumerate(merge_val(job, len(tasks)))}
    return entries


def _made_from(folder: Path) -> tuple[Options, Source]:
    """How a data set was made. Where only paths or times of its source differ, the bytes will decide."""
    made_from = existing.read_record(folder)
    if made_from is None:
        raise UserError(
            f"{folder}: does not say what it was made from; only a data set of preprocess can be repaired, "
            "an imported one is imported again"
        )
    try:
        options = from_record(folder, made_from)
        before = [made_from[key] for key in ("inputs", "val")]
        before = [(one["files"], one["bytes"]) if isinstance(one, dict) else one for one in before]
        source = look_up(options)
        now = record(options, source)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{folder / RECORD_NAME}: is damaged; copy it again, or preprocess again with --force"
        ) from None
    for name, then in zip(("inputs", "val"), before, strict=True):
        found = (now[name]["files"], now[name]["bytes"]) if isinstance(now[name], dict) else now[name]
        if found != then:
            raise UserError(
                f"{folder}: its source has changed since ({name}: {_words(found)}, it was made from "
                f"{_words(then)}); bring that back, or preprocess again with --force"
            )
    return options, source


def _words(totals: object) -> str:
    return f"{totals[0]} files of {totals[1]} bytes" if isinstance(totals, tuple) else f"{totals}"


def _encode_chosen(place: int, job: Job, report: Report, *, chosen: Sequence[int]) -> dict[str, Any]:
    return encode_task(chosen[place], job, report)


def _tasks_of(names: Collection[str], ends: Sequence[int]) -> list[int]:
    """The tasks that made these shards."""
    if any(name.startswith("val-") for name in names):
        return list(range(len(ends)))
    numbers = [int(name.removeprefix("train-").removesuffix(".h5")) for name in names]
    return sorted({next(task for task, end in enumerate(ends) if number < end) for number in numbers})


def _replace(work: Path, folder: Path, wanted: ShardEntry, made: ShardEntry | None) -> None:
    if made is None:
        raise UserError(
            f"{folder / wanted.name}: its source gives fewer shards now; preprocess again with --force"
        )
    if (made.xxh3_128, made.file_bytes) != (wanted.xxh3_128, wanted.file_bytes):
        same = made.content_xxh3_128 == wanted.content_xxh3_128
        why = (
            "its tokens are right, but another HDF5 library lays files out differently"
            if same
            else "other tokens"
        )
        raise UserError(
            f"{folder / wanted.name}: comes out with other bytes ({why}): its source has changed since, or a "
            "program; preprocess again with --force"
        )
    try:
        (work / made.name).rename(folder / wanted.name)
    except OSError as error:
        raise unwritable(folder / wanted.name, error) from error
