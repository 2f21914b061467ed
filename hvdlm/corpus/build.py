"""From options to a data set: the whole of `python -m hvdlm.preprocess`, without its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

from hvdlm.config import UserError
from hvdlm.corpus import existing
from hvdlm.corpus.encode import Counts, Job, TaskResult, refuse_write, val_stem
from hvdlm.corpus.options import Options, Source, look_up, record
from hvdlm.corpus.plan import Task, make_plan
from hvdlm.corpus.pool import run_tasks
from hvdlm.corpus.progress import Progress
from hvdlm.corpus.training_text import share_bytes, training_texts
from hvdlm.corpus.write import ShardWriter, load
from hvdlm.data.entries import ShardEntry, TokenizerInfo
from hvdlm.data.files import write_atomic
from hvdlm.data.manifest import Manifest, write_manifest
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import Tokenizer, from_library


@dataclass(frozen=True)
class Built:
    """A data set, and what became of the documents: None where it was there already."""

    manifest: Manifest
    counts: Counts | None


def build(options: Options, *, workers: int, force: bool = False, wait: bool = False) -> Built:
    """Make a data set, or find it already made. The number of workers does not show in its bytes.

    Args:
        options: what to make.
        workers: processes at most.
        force: replace another data set in the folder.
        wait: wait for another run that writes to the same folder.

    Returns:
        The data set.

    Raises:
        UserError: options that cannot be, bad input, a folder in use, a full disk.
    """
    source = look_up(options)
    made_from = record(options, source)
    with existing.claimed(options.out, wait=wait):
        same = existing.find_same(options.out, made_from, force=force)
        if same:
            return Built(same, None)
        try:
            work = existing.clear_work(options.out)
            job, entries, counts = _encode(options, source, work, workers)
            existing.remove_data_set(options.out)
            existing.write_record(options.out, made_from)
            return Built(_install(options.out, job, entries), counts)
        except OSError as error:
            refuse_write(options.out, error)
        finally:
            existing.remove_work(options.out)


def _encode(
    options: Options, source: Source, work: Path, workers: int
) -> tuple[Job, list[ShardEntry], Counts]:
    """Everything but the last renames: shards and tokenizer in `work`."""
    read = options.read
    tasks = make_plan(
        source.files, source.val_files, document=read.document, field=read.field, seed=options.seed
    )
    tokenizer = source.tokenizer or _train(tasks, options, source.vocab_size)
    write_atomic(work / existing.TOKENIZER_NAME, tokenizer.json_bytes)
    info = TokenizerInfo(
        existing.TOKENIZER_NAME, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id
    )
    job = Job(work, info, options.eos, read, options.val_fraction, options.shard_tokens, options.seed)
    with Progress("encode", sum(task.size_bytes for task in tasks)) as progress:
        results = run_tasks(tasks, job, workers=workers, report=progress)
    counts = reduce(add, (result.counts for result in results), Counts())
    _refuse_empty(counts, options)
    return job, [*(entry for result in results for entry in result.train), *_merge_val(results, job)], counts


def _train(tasks: Sequence[Task], options: Options, vocab_size: int) -> Tokenizer:
    builder = TOKENIZERS[options.tokenizer]
    if options.tokenizer == "byte":
        return from_library(builder([], vocab_size))
    share = share_bytes(tasks)
    with Progress(
        f"train {options.tokenizer} tokenizer", sum(min(task.size_bytes, share) for task in tasks)
    ) as progress:
        texts = training_texts(tasks, options.read, val_fraction=options.val_fraction, report=progress)
        return from_library(builder(texts, vocab_size))


def _refuse_empty(counts: Counts, options: Options) -> None:
    if counts.train and counts.val:
        return
    found = f"train has {counts.train} documents, val has {counts.val}"
    if not counts.train and not counts.val:
        raise UserError(
            f"{' '.join(options.inputs)}: no documents ({counts.empty} empty, {counts.skipped} skipped), so "
            f"{found}; needed some text in both"
        )
    cure = "give more documents, cut them by --document paragraph or line, or name other inputs by --val"
    if not options.val:
        cure = f"{cure}, or change --val-fraction {options.val_fraction}"
    raise UserError(f"a split is empty: {found}; {cure}")


def _merge_val(results: Sequence[TaskResult], job: Job) -> list[ShardEntry]:
    """Join the validation documents of all tasks, in the order of the plan."""
    writer = ShardWriter(job.folder / "val", "val", shard_tokens=job.shard_tokens, tokenizer=job.tokenizer)
    for result in results:
        writer.add(load(val_stem(job, result.index), job.tokenizer.token_dtype))
    writer.flush()
    return writer.entries


def _install(out: Path, job: Job, entries: Sequence[ShardEntry]) -> Manifest:
    """Move everything into place, the manifest last; shards are numbered through in the order of the plan."""
    (job.folder / job.tokenizer.file).rename(out / job.tokenizer.file)
    numbered: list[ShardEntry] = []
    for split in ("train", "val"):
        for number, entry in enumerate(entry for entry in entries if entry.split == split):
            name = f"{split}-{number:05d}.h5"
            (job.folder / entry.name).rename(out / name)
            numbered.append(replace(entry, name=name))
    return write_manifest(out, numbered, tokenizer=job.tokenizer)
