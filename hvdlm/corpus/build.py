"""From options to a data set: the whole of `python -m hvdlm.preprocess`, without its words.

Stages, each done by whoever of the crew is there; a stage is over when all its tasks are done:

    open        one process looks the options up and writes the plan
    hash, drop  with --dedup: find the duplicates
    tokenizer   one process trains it, where it is to be trained
    encode      the tasks: documents to shards
    install     one process moves everything into place
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus import crew as crews
from hvdlm.corpus import dedup, existing, hold, stats
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.encode import encode_task, refuse_write
from hvdlm.corpus.install import LostError, install, refuse_bad, refuse_empty
from hvdlm.corpus.job import TOKENIZER_NAME, Job, Tally
from hvdlm.corpus.options import Options, Source, look_up, record
from hvdlm.corpus.plan import Task, make_plan
from hvdlm.corpus.pool import Team
from hvdlm.corpus.progress import Progress
from hvdlm.corpus.tokenizer_stage import forget_choice, provide
from hvdlm.corpus.work import GoneError, PeerError, StoppedError, Work
from hvdlm.data import manifest as manifests
from hvdlm.data.files import write_atomic
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.text import fast

_POLL_S = 0.2
_TIMED = ("hash", "tokenizer", "encode")


@dataclass(frozen=True)
class Built:
    """A data set, and what is known of how it was made: `made` is false where it was there already."""

    manifest: Manifest
    stats: dict[str, Any]
    made: bool


def build(
    options: Options,
    *,
    workers: int,
    crew: Crew | None = None,
    force: bool = False,
    wait: bool = False,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Built:
    """Make a data set, go on with one that was begun, or find it already made.

    Neither the number of processes nor what happened to them shows in its bytes.

    Args:
        options: what to make.
        workers: processes of this member of the crew.
        crew: who makes it together; None = this process alone.
        force: replace another data set in the folder, or the unfinished work of one.
        wait: wait for another run that writes to the same folder.
        wants_stop: asked now and then whether to stop.

    Returns:
        The data set.

    Raises:
        UserError: options that cannot be, bad input, a folder in use, a full disk; `StoppedError`
            after a stop, `PeerError` where another process failed.
    """
    crew = crew or crews.alone()
    held = hold.claimed(options.out, existing.WORK_NAME, wait=wait, crew=crew, wants_stop=wants_stop)
    with held as surely:
        try:
            work = Work(options.out / existing.WORK_NAME, crew, wants_stop)
        except OSError as error:
            refuse_write(options.out, error)
        with work:
            if not surely:
                hold.refuse_others(options.out, work)
            made = _attempt(options, work, workers=workers, force=force)
            keeps = not made and _keeps(work)
        if not keeps:
            work.remove()
        return Built(read_manifest(options.out), stats.read(options.out), made)


def _attempt(options: Options, work: Work, *, workers: int, force: bool) -> bool:
    """As `_build`; an error is told to the others, unless they have completed the data set without it."""
    try:
        return _build(options, work, workers=workers, force=force)
    except BaseException as error:
        if isinstance(error, GoneError) or (isinstance(error, Exception) and _is_over(options.out, work)):
            return True
        _fail(work, error)
        if isinstance(error, OSError):
            refuse_write(options.out, error)
        raise


def _keeps(work: Work) -> bool:
    """Whether a start that had nothing to do has found work of another data set, which stays."""
    with suppress(GoneError):
        return bool(work.result("open", 0)["keep"])
    return False


def _is_over(out: Path, work: Work) -> bool:
    """Whether others have taken over while this process slept, and have completed the data set."""
    return work.is_gone() and (out / manifests.FILE_NAME).exists()


def _fail(work: Work, error: BaseException) -> None:
    """Tell the others, and keep what was done where it is worth going on with."""
    if isinstance(error, PeerError | StoppedError):
        return
    told = f"{type(error).__name__}: {error}"
    work.fail(error if isinstance(error, UserError) else UserError(told, EXIT_CRASH))
    with suppress(GoneError, OSError):
        # What a start that was refused has found there is another's.
        own = work.is_done("open", 0) or existing.read_record(work.folder) is None
        if own and work.crew.size == 1 and not any(work.done(stage) for stage in existing.WORTH_KEEPING):
            work.remove()


def _build(options: Options, work: Work, *, workers: int, force: bool) -> bool:
    """All stages; False where the data set was there already."""
    opened = _once(work, "open", lambda: _open(options, work, force=force))
    if opened["same"]:
        return False
    job = job_of(options, work.folder)
    count, total_bytes = opened["tasks"], opened["bytes"]
    shows = work.crew.rank == 0 or work.crew.apart
    with (
        Progress(work, shows=shows) as progress,
        Team(work, job, workers=workers, report=progress) as team,
    ):
        if job.keep.dedup:
            find_duplicates(job, work, team, progress, count=count, total_bytes=total_bytes)
        _once(work, "tokenizer", lambda: provide(options, job, opened, progress))
        progress.stage("encode", count=count, total_bytes=total_bytes, before=_done_before(work, job))
        team.run("encode", encode_task, count)
    _once(work, "install", lambda: _install(options, work, job, opened))
    return True


def find_duplicates(
    job: Job, work: Work, team: Team, progress: Progress, *, count: int, total_bytes: int
) -> None:
    """The two stages that find out which documents are there twice.

    Args:
        job: common to all tasks.
        work: where results are kept.
        team: does the work.
        progress: shows it.
        count: tasks of the plan.
        total_bytes: their weight.

    Raises:
        UserError: bad input, or a full disk.
    """
    dedup.forget_lost(job, work)
    progress.stage("hash", count=count, total_bytes=total_bytes)
    team.run("hash", dedup.hash_task, count)
    hashed = [work.result("hash", index) for index in range(count)]
    ranges = dedup.count_ranges(sum(one["documents"] for one in hashed))
    runs = [one["runs"] for one in hashed]
    team.run("drop", partial(dedup.find_drops, ranges=ranges, runs=runs), ranges)


def _once(work: Work, stage: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage of one task, done by this process itself or by another."""
    while not work.is_done(stage, 0):
        work.check()
        if work.claim(stage, 1) is not None:
            work.finish(stage, 0, do())
        else:
            time.sleep(_POLL_S)
    return work.result(stage, 0)


def _open(options: Options, work: Work, *, force: bool) -> dict[str, Any]:
    """Look the options up; write the plan, unless the data set is there already."""
    source = look_up(options)
    made_from = record(options, source)
    if existing.find_same(options.out, made_from, force=force, start=work.crew.name) is not None:
        return {"same": True, "keep": existing.is_anothers(work, made_from)}
    # Before anything is written: what cannot be planned leaves no work to be in the next command's way.
    tasks = plan_of(options, source)
    if not tasks:
        raise UserError(f"{' '.join(options.inputs)}: holds no documents; needed some text")
    existing.open_work(options.out, work, made_from, force=force)
    job_of(options, work.folder).write_plan(tasks)
    if options.encoder == "reference":
        forget_choice(work)
    if source.tokenizer:
        write_atomic(work.folder / TOKENIZER_NAME, source.tokenizer.json_bytes)
    return {
        "same": False,
        "tasks": len(tasks),
        "bytes": sum(task.size_bytes for task in tasks),
        "vocab_size": source.vocab_size,
        "given": source.tokenizer is not None,
        "record": made_from,
    }


def job_of(options: Options, folder: Path) -> Job:
    """What all tasks of a data set have in common."""
    return Job(
        folder,
        options.eos,
        options.read,
        options.keep,
        options.val_fraction,
        options.shard_tokens,
        options.seed,
    )


def plan_of(options: Options, source: Source) -> list[Task]:
    """The tasks of a data set."""
    read = options.read
    return make_plan(
        source.files, source.val_files, document=read.document, field=read.field, seed=options.seed
    )


def _done_before(work: Work, job: Job) -> Tally:
    done = work.done("encode")
    return Tally(sum(job.task(index).size_bytes for index in done), tasks=len(done))


def _install(options: Options, work: Work, job: Job, opened: dict[str, Any]) -> dict[str, Any]:
    encoded = [work.result("encode", index) for index in range(opened["tasks"])]
    refuse_bad(encoded, options)
    try:
        refuse_empty(encoded, options)
    except UserError:
        # The same command cannot do better: what is done helps nobody.
        for stage in existing.WORTH_KEEPING:
            shutil.rmtree(work.folder / "done" / stage, ignore_errors=True)
        raise
    making = {"start": work.crew.name, "encoder": job.choice or fast.REFERENCE}
    for stage in _TIMED:
        if done := work.done(stage):
            making[stage] = round(sum(work.result(stage, index)["seconds"] for index in done), 3)
    try:
        install(options.out, job, work, encoded, record=opened["record"], making=making)
    except LostError as error:
        for task in error.tasks:
            work.forget("encode", task)
        raise
    return {}
