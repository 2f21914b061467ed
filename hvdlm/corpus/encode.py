"""One task: read its documents, split them, encode them, write its shards."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import xxhash

from hvdlm.config import EXIT_CRASH, EXIT_USAGE, UserError
from hvdlm.corpus.plan import Task
from hvdlm.corpus.readers import ReadOptions, read_documents
from hvdlm.corpus.write import DocumentList, ShardWriter, save
from hvdlm.data.entries import SPLITS, ShardEntry, TokenizerInfo
from hvdlm.text.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 18
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Job:
    """What every task of a run has in common.

    Attributes:
        folder: where tasks write; it holds the tokenizer's file.
        tokenizer: what makes the ids.
        eos: name of the token that ends a document, or "" for the usual ones.
        read: how documents are read.
        val_fraction: share of documents that goes to validation, 0..1.
        shard_tokens: tokens a shard at most.
        seed: of the order of documents.
    """

    folder: Path
    tokenizer: TokenizerInfo
    eos: str
    read: ReadOptions
    val_fraction: float
    shard_tokens: int
    seed: int


@dataclass(frozen=True)
class Counts:
    """What became of documents: kept for training, kept for validation, empty, skipped as not UTF-8."""

    train: int = 0
    val: int = 0
    empty: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.train + other.train,
            self.val + other.val,
            self.empty + other.empty,
            self.skipped + other.skipped,
        )


@dataclass(frozen=True)
class TaskResult:
    """What a task left in the job's folder: its shards for training, and its validation piece by index."""

    index: int
    train: tuple[ShardEntry, ...]
    counts: Counts


def split_of(task: Task, text: bytes, val_fraction: float) -> str:
    """Where a document goes: by its own hash, so equal ones stay together whatever else is there.

    Args:
        task: may decide by itself.
        text: UTF-8.
        val_fraction: 0..1.

    Returns:
        "train" or "val".
    """
    if task.split:
        return task.split
    return "val" if xxhash.xxh3_64_intdigest(text) < val_fraction * 2.0**64 else "train"


def encode_task(task: Task, job: Job, tokenizer: Tokenizer, report: Callable[[int], None]) -> TaskResult:
    """Encode a task. Its output follows from task and job alone.

    Args:
        task: from the plan.
        job: common to all tasks.
        tokenizer: loaded from the job's folder.
        report: called with newly read bytes (of the plan's weights) now and then.

    Returns:
        What was written.

    Raises:
        UserError: bad input, or a full disk.
    """
    kept = {s: DocumentList(job.shard_tokens, job.tokenizer.eos_id, tokenizer.dtype) for s in SPLITS}
    counts = Counts()
    for texts, more_counts, read_bytes in _batches(task, job.read):
        counts += more_counts
        encoded = tokenizer.encode_batch(texts)
        raws = [text.encode() for text in texts]
        splits = [split_of(task, raw, job.val_fraction) for raw in raws]
        for split, documents in kept.items():
            chosen = [i for i, s in enumerate(splits) if s == split]
            documents.add([encoded[i] for i in chosen], [len(raws[i]) for i in chosen])
        counts += Counts(train=splits.count("train"), val=splits.count("val"))
        report(read_bytes)
    try:
        shards = ShardWriter(
            job.folder / f"train-{task.index:05d}",
            "train",
            shard_tokens=job.shard_tokens,
            tokenizer=job.tokenizer,
        )
        for block in kept["train"].take().shuffled(seed=job.seed, task=task.index):
            shards.add(block)
        shards.flush()
        save(val_stem(job, task.index), kept["val"].take().shuffled(seed=job.seed, task=task.index))
    except OSError as error:
        refuse_write(job.folder, error)
    return TaskResult(task.index, tuple(shards.entries), counts)


def val_stem(job: Job, index: int) -> Path:
    """Where a task's validation documents wait to be merged."""
    return job.folder / f"val-{index:05d}"


def refuse_write(folder: Path, error: OSError) -> NoReturn:
    """Turn a write that the file system refused into one line; any other failure stays what it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure, code = "free space or choose another --out, then run again", EXIT_CRASH
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure, code = "choose another --out", EXIT_USAGE
    else:
        raise error
    raise UserError(f"{folder}: cannot be written: {error.strerror}; {cure}", code) from error


def _batches(task: Task, read: ReadOptions) -> Iterator[tuple[list[str], Counts, int]]:
    """Texts to encode in one call, what else was met, and how many bytes were read since the last."""
    texts: list[str] = []
    chars = empty = skipped = before = told = 0
    for piece in task.pieces:
        for text, done_bytes in read_documents(piece, read):
            if not text:
                skipped, empty = skipped + (text is None), empty + (text == "")
                continue
            texts.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS or len(texts) >= _BATCH_DOCUMENTS:
                yield texts, Counts(empty=empty, skipped=skipped), before + done_bytes - told
                texts, chars, empty, skipped, told = [], 0, 0, 0, before + done_bytes
        before += piece.size_bytes
    yield texts, Counts(empty=empty, skipped=skipped), before - told
