"""Exact deduplication over the whole input, in files and bounded memory.

1. Each task of the plan hashes its documents (XXH3-128) and writes them in runs, each sorted by hash. What
   is there twice in a run is settled at once: a run has every hash once, however often a text occurs.
2. The space of hashes is cut into ranges; each range reads its part of every run and finds equal hashes.
   Of equal documents the first in plan order is kept, so nothing depends on who did what.
3. A task that is encoded leaves out what its runs and the ranges name.

Two different texts of one hash would be taken for equal: below 1e-18 for 10^10 documents.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hvdlm.corpus.documents import Kept, Rejects, kept_documents
from hvdlm.corpus.job import Job, Report, Tally
from hvdlm.corpus.plan import Task
from hvdlm.corpus.work import Work
from hvdlm.data.files import publishing

RANGE_DOCUMENTS = RUN_DOCUMENTS = 4 << 20
"""Documents a range (about) and a run (at most) hold: 24 bytes each, and as much again to sort them."""
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u4")])
_DROP = np.dtype([("task", "<u4"), ("index", "<u4")])
_REPORT_EVERY = 1024


def hash_task(index: int, job: Job, report: Report) -> dict[str, Any]:
    """Hash the documents of a task.

    Raises:
        UserError: bad input, or a full disk.
    """
    begun, task, told = time.monotonic(), job.task(index), 0
    digests = bytearray()
    documents = runs = 0
    for text, done_bytes in kept_documents(task, job, Rejects(job.keep.max_errors)):
        digests += xxhash.xxh3_128_digest(text)
        del text
        documents += 1
        if documents % _REPORT_EVERY == 0:
            report(Tally(done_bytes - told, _REPORT_EVERY))
            told = done_bytes
        if documents % RUN_DOCUMENTS == 0:
            _save_run(job, index, runs, digests)
            runs += 1
            digests.clear()
    _save_run(job, index, runs, digests)
    report(Tally(task.size_bytes - told, documents % _REPORT_EVERY))
    return {"documents": documents, "runs": runs + 1, "seconds": time.monotonic() - begun}


def count_ranges(documents: int) -> int:
    """How many ranges so many documents are looked at in."""
    return max(1, -(-documents // RANGE_DOCUMENTS))


def find_drops(index: int, job: Job, report: Report, *, ranges: int, runs: Sequence[int]) -> dict[str, Any]:
    """Find the documents of one range of hashes that are in an earlier run too.

    Args:
        index: of the range.
        job: common to all.
        report: hears nothing; a range is short.
        ranges: how many there are.
        runs: how many each task has.

    Raises:
        UserError: a full disk.
    """
    del report
    pairs = [(task, run) for task, count in enumerate(runs) for run in range(count)]
    parts = [_range_of(_hash_path(job, *pair), index, ranges) for pair in pairs]
    hashes = np.concatenate(parts)
    owners = np.repeat(np.array([task for task, _ in pairs], "<u4"), [len(part) for part in parts])
    # A stable sort: equal hashes stay in plan order, and within a task in that of its runs.
    order = np.lexsort((hashes["low"], hashes["high"]))
    later, earlier = hashes[order[1:]], hashes[order[:-1]]
    same = order[1:][(later["high"] == earlier["high"]) & (later["low"] == earlier["low"])]
    drops = np.empty(len(same), _DROP)
    drops["task"], drops["index"] = owners[same], hashes["index"][same]
    _save(_drop_path(job, index), np.sort(drops, order=["task", "index"]))
    return {"duplicates": len(drops)}


def unique_documents(task: Task, job: Job, rejects: Rejects) -> Iterator[Kept]:
    """The kept documents of a task (see `kept_documents`) without duplicates, which are counted."""
    is_duplicate = duplicate_flags(task.index, job)
    for document in kept_documents(task, job, rejects):
        if next(is_duplicate):
            rejects.count("duplicate")
        else:
            yield document
        del document


def duplicate_flags(task: int, job: Job) -> Iterator[int]:
    """For each document of a task in turn, and without end: 1 where it is a duplicate of an earlier one."""
    if not job.keep.dedup:
        yield from repeat(0)  # For ever.
    for run in count():
        flags = np.zeros(RUN_DOCUMENTS, np.uint8)
        flags[drops_of(task, job, run)] = 1
        yield from flags.tobytes()


def drops_of(task: int, job: Job, run: int) -> np.ndarray:
    """Which documents of a run are duplicates of earlier ones: their places in it, rising, int64 [k]."""
    copies = _copies_path(job, task, run)
    found = [np.fromfile(copies, "<u4")] if copies.exists() else []
    first = run * RUN_DOCUMENTS
    for path in job.folder.glob("drops-*.bin"):
        table = _open(path, _DROP)
        begin, end = np.searchsorted(table["task"], [task, task + 1])
        places = np.array(table["index"][begin:end])
        begin, end = np.searchsorted(places, [first, first + RUN_DOCUMENTS])
        found.append(places[begin:end])
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found])) - first


def forget_lost(job: Job, work: Work) -> None:
    """Forget results of both stages whose files are not there any more."""
    for index in work.done("hash"):
        runs = range(work.result("hash", index).get("runs", 0))
        files = [path(job, index, run) for path in (_hash_path, _copies_path) for run in runs]
        if not files or not all(file.exists() for file in files):
            work.forget("hash", index)
    for index in work.done("drop"):
        if not _drop_path(job, index).exists():
            work.forget("drop", index)


def _save_run(job: Job, task: int, run: int, digests: bytearray) -> None:
    """Write a run of a task: each hash once, sorted, and the places of its other copies."""
    hashes = np.frombuffer(bytes(digests), ">u8").reshape(-1, 2)
    # A stable sort: of equal documents the first comes first.
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered, places = hashes[order], order + run * RUN_DOCUMENTS
    copies = np.zeros(len(ordered), bool)
    copies[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    table = np.empty(len(ordered) - int(copies.sum()), _HASH)
    table["high"], table["low"] = ordered[~copies].T
    table["index"] = places[~copies]
    _save(_hash_path(job, task, run), table)
    _save(_copies_path(job, task, run), np.sort(places[copies]).astype("<u4"))


def _range_of(path: Path, index: int, ranges: int) -> np.ndarray:
    """The hashes of one file that begin with this range's part of 0..2^64."""
    table = _open(path, _HASH)
    bounds = [(i << 64) // ranges for i in (index, index + 1)]
    high = table["high"]
    first = int(np.searchsorted(high, np.uint64(bounds[0])))
    end = len(high) if bounds[1] >= 1 << 64 else int(np.searchsorted(high, np.uint64(bounds[1])))
    return np.array(table[first:end])


def _open(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _save(path: Path, table: np.ndarray) -> None:
    with publishing(path) as temp, temp.open("xb") as file:
        file.write(table.tobytes())


def _hash_path(job: Job, task: int, run: int) -> Path:
    return job.folder / f"hashes-{task:05d}-{run}.bin"


def _copies_path(job: Job, task: int, run: int) -> Path:
    return job.folder / f"copies-{task:05d}-{run}.bin"


def _drop_path(job: Job, index: int) -> Path:
    return job.folder / f"drops-{index:05d}.bin"
