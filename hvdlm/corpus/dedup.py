"""Exact deduplication over the whole input, in files and bounded memory.

1. Each task of the plan hashes its documents (XXH3-128) and writes them sorted by hash.
2. The space of hashes is cut into ranges; each range reads its part of every file and finds equal hashes.
   Of equal documents the first in plan order is kept, so nothing depends on who did what.
3. A task that is encoded leaves out what the ranges name.

Two different texts of one hash would be taken for equal: below 1e-18 for 10^10 documents.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hvdlm.corpus.documents import Rejects, digest, kept_documents
from hvdlm.corpus.job import Job, Report, Tally
from hvdlm.data.files import publishing

RANGE_DOCUMENTS = 4 << 20
"""Documents a range holds, about: 24 bytes each, and as much again to sort them."""
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u4")])
_DROP = np.dtype([("task", "<u4"), ("index", "<u4")])
_REPORT_EVERY = 1024


def hash_task(index: int, job: Job, report: Report) -> dict[str, Any]:
    """Hash the documents of a task.

    Raises:
        UserError: bad input, or a full disk.
    """
    begun, task, told = time.monotonic(), job.task(index), 0
    digests: list[bytes] = []
    done_bytes = 0
    for text, done_bytes in kept_documents(task, job, Rejects(job.keep.max_errors)):
        digests.append(digest(text, xxhash.xxh3_128()).digest())
        if len(digests) % _REPORT_EVERY == 0:
            report(Tally(done_bytes - told, _REPORT_EVERY))
            told = done_bytes
    hashes = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
    table = np.empty(len(hashes), _HASH)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    table["high"], table["low"], table["index"] = hashes[order, 0], hashes[order, 1], order
    _save(_hash_path(job, index), table)
    report(Tally(task.size_bytes - told, len(digests) % _REPORT_EVERY))
    return {"documents": len(digests), "seconds": time.monotonic() - begun}


def count_ranges(documents: int) -> int:
    """How many ranges so many documents are looked at in."""
    return max(1, -(-documents // RANGE_DOCUMENTS))


def find_drops(index: int, job: Job, report: Report, *, ranges: int, tasks: int) -> dict[str, Any]:
    """Find the duplicates of one range of hashes.

    Args:
        index: of the range.
        job: common to all.
        report: hears nothing; a range is short.
        ranges: how many there are.
        tasks: how many tasks were hashed.

    Raises:
        UserError: a full disk.
    """
    del report
    parts = [_range_of(_hash_path(job, task), index, ranges) for task in range(tasks)]
    hashes = np.concatenate(parts)
    owners = np.repeat(np.arange(tasks, dtype="<u4"), [len(part) for part in parts])
    # A stable sort: equal hashes stay in plan order, and within a task in that of its documents.
    order = np.lexsort((hashes["low"], hashes["high"]))
    later, earlier = hashes[order[1:]], hashes[order[:-1]]
    same = order[1:][(later["high"] == earlier["high"]) & (later["low"] == earlier["low"])]
    drops = np.empty(len(same), _DROP)
    drops["task"], drops["index"] = owners[same], hashes["index"][same]
    _save(_drop_path(job, index), np.sort(drops, order=["task", "index"]))
    return {"duplicates": len(drops)}


def drops_of(task: int, job: Job) -> np.ndarray:
    """Which documents of a task are duplicates of earlier ones: their places, rising, int64 [k]."""
    found = [np.zeros(0, "<u4")]
    for path in sorted(job.folder.glob("drops-*.bin")) if job.keep.dedup else ():
        table = _open(path, _DROP)
        first, end = np.searchsorted(table["task"], [task, task + 1])
        found.append(np.array(table["index"][first:end]))
    return np.sort(np.concatenate(found)).astype(np.int64)


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


def _hash_path(job: Job, task: int) -> Path:
    return job.folder / f"hashes-{task:05d}.bin"


def _drop_path(job: Job, index: int) -> Path:
    return job.folder / f"drops-{index:05d}.bin"
