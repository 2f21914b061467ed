"""One task: read its documents, split them, encode them, write its shards."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from hvdlm.config import EXIT_CRASH, EXIT_USAGE, UserError
from hvdlm.corpus.dedup import unique_documents
from hvdlm.corpus.documents import Rejects, split_of
from hvdlm.corpus.job import Job, Report, Tally
from hvdlm.corpus.piles import Pile, PileWriter, count_tokens, groups, remove, save_in_order
from hvdlm.corpus.plan import Task
from hvdlm.corpus.stats import summary, total
from hvdlm.corpus.write import ShardWriter
from hvdlm.data.entries import SPLITS
from hvdlm.data.files import TEMP_PREFIX
from hvdlm.data.order import permute
from hvdlm.text.pieces import cut_utf8

_BATCH_CHARS = 1 << 18
_BATCH_PARTS = 1024


class Part(NamedTuple):
    """A piece of a document short enough to be encoded at once.

    Attributes:
        text_bytes: of the document that ends with it; 0 where it goes on.
    """

    text: str
    split: str
    text_bytes: int


def encode_task(index: int, job: Job, report: Report) -> dict[str, Any]:
    """Encode a task. What it leaves in the job's folder follows from plan and job alone.

    Args:
        index: of the task.
        job: common to all.
        report: called with what was newly counted, now and then.

    Returns:
        JSON: `train`, the entries of its shards; `counts` of what was left out; `splits`, statistics;
        `seconds`. Its validation documents are a pile (`val_stem`).

    Raises:
        UserError: bad input, or a full disk.
    """
    begun = time.monotonic()
    task = job.task(index)
    stems = {s: job.folder / f"{TEMP_PREFIX}{secrets.token_hex(6)}-{index:05d}-{s}" for s in SPLITS}
    try:
        with Rejects(job.keep.max_errors, rejects_path(job, index)) as rejects:
            _encode(task, job, rejects, stems=stems, report=report)
            train, statistics = _write(index, job, stems)
    except OSError as error:
        refuse_write(job.folder, error)
    finally:
        for stem in stems.values():
            remove(stem)
    seconds = time.monotonic() - begun
    return {"train": train, "counts": rejects.counts, "splits": statistics, "seconds": seconds}


def val_stem(job: Job, index: int) -> Path:
    """Where a task's validation documents wait to be merged."""
    return job.folder / f"val-{index:05d}"


def rejects_path(job: Job, index: int) -> Path:
    """Where a task writes which documents it rejected."""
    return job.folder / f"rejects-{index:05d}.jsonl"


def refuse_write(folder: Path, error: OSError) -> NoReturn:
    """Turn a write that the file system refused into one line; a file that is gone stays what it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure, code = "free space or choose another --out, then run again", EXIT_CRASH
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure, code = "choose another --out", EXIT_USAGE
    elif isinstance(error, FileNotFoundError) or error.errno is None:
        raise error
    else:
        cure, code = "check the folder and the file system", EXIT_CRASH
    raise UserError(f"{folder}: cannot be written: {error.strerror}; {cure}", code) from error


def _encode(task: Task, job: Job, rejects: Rejects, *, stems: dict[str, Path], report: Report) -> None:
    """Encode the kept documents into a pile for each split."""
    encoder = job.tokenizer
    with ExitStack() as stack:
        piles = {
            split: stack.enter_context(
                PileWriter(stem, eos_id=encoder.eos_id, dtype=encoder.dtype, limit=job.shard_tokens - 1)
            )
            for split, stem in stems.items()
        }
        told = 0
        for parts, done_bytes in _batches(task, job, rejects):
            tokens = 0
            for part, ids in zip(parts, encoder.encode_batch([part.text for part in parts]), strict=True):
                piles[part.split].add(ids)
                tokens += len(ids)
                if part.text_bytes:
                    piles[part.split].end(part.text_bytes)
            documents = sum(part.text_bytes > 0 for part in parts)
            report(Tally(done_bytes - told, documents, tokens + documents))
            told = done_bytes
        for pile in piles.values():
            pile.flush()
    report(Tally(task.size_bytes - told, rejected=rejects.rejected))


def _write(index: int, job: Job, stems: dict[str, Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Shuffle the piles: the one for training into shards, the other into a pile to be merged."""
    dtype = job.tokenizer.dtype
    shards = ShardWriter(
        job.folder / f"train-{index:05d}",
        "train",
        shard_tokens=min(job.shard_tokens, count_tokens(stems["train"], dtype)),
        tokenizer=job.tokenizer_info,
    )
    for pile, order in _shuffled(stems["train"], job, index):
        shards.add(pile, order)
    shards.flush()
    save_in_order(_shuffled(stems["val"], job, index), val_stem(job, index), dtype)
    statistics = {split: total([*map(summary, groups(stem, dtype))]) for split, stem in stems.items()}
    return [asdict(entry) for entry in shards.entries], statistics


def _shuffled(stem: Path, job: Job, task: int) -> Iterator[tuple[Pile, np.ndarray]]:
    """The groups of a pile, and for each an order of its documents, int64 [n], by (seed, task, group)."""
    for number, pile in enumerate(groups(stem, job.tokenizer.dtype)):
        yield pile, shuffled(len(pile.lengths), seed=job.seed, key=number << 32 | task)


def shuffled(n: int, *, seed: int, key: int) -> np.ndarray:
    """An order of n documents that follows from (seed, key): int64 [n]."""
    if n == 0:
        return np.zeros(0, np.int64)
    return permute(np.arange(n), n, seed=seed, epochs=np.full(n, key, np.int64))


def _batches(task: Task, job: Job, rejects: Rejects) -> Iterator[tuple[list[Part], int]]:
    """Parts to encode in one call, and how many bytes of the task are read by then."""
    parts: list[Part] = []
    chars = done_bytes = 0
    for text, done_bytes in unique_documents(task, job, rejects):
        split, pieces = split_of(task, text, job.val_fraction), cut_utf8(text)
        for piece in pieces:
            parts.append(Part(piece, split, 0))
            chars += len(piece)
            if chars >= _BATCH_CHARS or len(parts) >= _BATCH_PARTS:
                # The last part of a text is known as such only when the next is asked for.
                following = next(pieces, None)
                parts[-1] = Part(piece, split, len(text) if following is None else 0)
                yield parts, done_bytes
                parts, chars = [], 0
                if following is not None:
                    parts, chars = [Part(following, split, 0)], len(following)
        if parts:
            parts[-1] = parts[-1]._replace(text_bytes=len(text))
        del text
    yield parts, done_bytes
