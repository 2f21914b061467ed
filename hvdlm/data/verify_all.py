"""Every byte of a data set: its tokenizer, and of each shard size, digests, structure, ids and documents."""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, final

import numpy as np
import xxhash

from hvdlm.config import UserError
from hvdlm.data.digests import digest_block, digest_content
from hvdlm.data.entries import BLOCK_TOKENS, MalformedError, ShardEntry, TokenizerInfo
from hvdlm.data.extents import read_block, read_pieces, read_whole
from hvdlm.data.files import open_checked
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.structure import check_structure
from hvdlm.data.verify import Problem


def verify_folder(folder: Path, *, workers: int = 1) -> list[Problem]:
    """Check everything: the tokenizer, and of each shard size, digest, structure, blocks, ids, documents.

    Args:
        folder: The data set.
        workers: Threads.

    Returns:
        What is wrong, in the order of the manifest; empty if nothing is.

    Raises:
        UserError: There is no usable manifest.
    """
    manifest = read_manifest(folder)
    problems = verify_tokenizer(folder, manifest.tokenizer)
    with Verification(folder, manifest, manifest.shards, workers=workers) as verification:
        return problems + verification.problems()


def share_by_size(shards: Sequence[ShardEntry], parts: int) -> list[list[ShardEntry]]:
    """Deal shards out so that every part has about as many bytes, the largest first.

    A shard is never cut: the digest of a whole file is made from its first byte to its last.

    Returns:
        One list a part, possibly empty; together every shard once.
    """
    shares: list[list[ShardEntry]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for entry in _largest_first(shards):
        load, part = heapq.heappop(loads)
        shares[part].append(entry)
        heapq.heappush(loads, (load + entry.file_bytes, part))
    return shares


@final
class Verification:
    """Checks shards in threads while the caller watches. A context manager: leaving it ends the threads.

    Threads are enough: reading, hashing and comparing release the GIL.

    Args:
        folder: The data set.
        manifest: Its manifest.
        shards: Those to check.
        workers: Threads, at least 1.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, shards: Sequence[ShardEntry], *, workers: int
    ) -> None:
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._new_bytes = 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        check = partial(verify_shard, tokenizer=manifest.tokenizer, report=self._count, stop=self._stop)
        # A large shard that came last would keep one thread busy after all the others.
        ordered = _largest_first(shards)
        started = {entry.name: self._pool.submit(check, folder / entry.name, entry) for entry in ordered}
        self._futures = [started[entry.name] for entry in shards]

    def __enter__(self) -> Verification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is checked, or so long: whether everything is."""
        return not wait(self._futures, timeout_s).not_done

    def take_bytes(self) -> int:
        """Bytes that were checked since this was asked last."""
        with self._lock:
            taken, self._new_bytes = self._new_bytes, 0
        return taken

    def problems(self) -> list[Problem]:
        """Wait for the end: what is wrong, in the order of the shards given."""
        return [problem for future in self._futures for problem in future.result()]

    def _count(self, more_bytes: int) -> None:
        with self._lock:
            self._new_bytes += more_bytes


def verify_shard(
    path: Path,
    entry: ShardEntry,
    tokenizer: TokenizerInfo,
    *,
    report: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[Problem]:
    """Check one shard, reading each byte once. HDF5 sees it only if the digest of the whole file is right.

    Args:
        path: Its file.
        entry: Its row of the manifest.
        tokenizer: The data set's.
        report: Called with newly checked bytes.
        stop: Ends it early, without a verdict.

    Returns:
        What is wrong; empty if nothing is.
    """
    watch = _Watch(report or (lambda _: None), stop or threading.Event())
    try:
        fd = open_checked(path, entry.file_bytes)
        try:
            digest, problems = _read_through(fd, path, entry, tokenizer=tokenizer, watch=watch)
        finally:
            os.close(fd)
        if watch.stop.is_set():
            return []
        if digest == entry.xxh3_128:
            check_structure(path, entry, tokenizer)
        elif not problems:
            problems = [Problem(entry.name, None, "damaged outside its tokens and documents")]
        return problems
    except (UserError, MalformedError, OSError) as error:
        return [Problem.unreadable(path, error)]
    except MemoryError:
        return [Problem(entry.name, None, "its tables are larger than this machine's memory")]


def verify_tokenizer(folder: Path, tokenizer: TokenizerInfo) -> list[Problem]:
    """Check that the tokenizer's file is the one that made the shards."""
    try:
        found = hashlib.sha256((folder / tokenizer.file).read_bytes()).hexdigest()
    except OSError as error:
        return [Problem(tokenizer.file, None, f"cannot be read: {error.strerror}")]
    if found != tokenizer.sha256:
        return [Problem(tokenizer.file, None, "not the tokenizer that made the shards (sha256)")]
    return []


class _Watch(NamedTuple):
    report: Callable[[int], None]
    stop: threading.Event


def _largest_first(shards: Sequence[ShardEntry]) -> list[ShardEntry]:
    return sorted(shards, key=lambda entry: (-entry.file_bytes, entry.name))


def _read_through(
    fd: int, path: Path, entry: ShardEntry, *, tokenizer: TokenizerInfo, watch: _Watch
) -> tuple[str, list[Problem]]:
    """The digest of the whole file, and what is wrong with the three data sets at the manifest's places."""
    stored = read_whole(fd, path, entry.extents.block_xxh3)
    offsets = read_whole(fd, path, entry.extents.doc_offsets)
    rising = offsets[0] == 0 and offsets[-1] == entry.tokens and bool((offsets[1:] > offsets[:-1]).all())
    whole, computed, invalid = xxhash.xxh3_128(), np.empty_like(stored), []
    tokens_at = entry.extents.tokens
    for piece in read_pieces(fd, path, first=0, end=tokens_at.offset):
        whole.update(piece)
    for block in range(len(stored)):
        if watch.stop.is_set():
            break
        tokens = read_block(fd, path, entry, block)
        whole.update(tokens.data)
        computed[block] = digest_block(tokens)
        if int(tokens.max()) >= tokenizer.vocab_size:
            invalid.append(Problem(entry.name, block, f"holds an id beyond {tokenizer.vocab_size - 1}"))
        elif rising and not _documents_end(tokens, offsets, block, tokenizer.eos_id):
            invalid.append(Problem(entry.name, block, f"a document does not end with id {tokenizer.eos_id}"))
        watch.report(tokens.nbytes)
    for piece in read_pieces(fd, path, first=tokens_at.end, end=entry.file_bytes):
        whole.update(piece)
    watch.report(entry.file_bytes - tokens_at.end + tokens_at.offset)
    damaged = _damaged(entry, stored, computed, offsets)
    if damaged or rising:
        return whole.hexdigest(), damaged or invalid
    return whole.hexdigest(), [Problem(entry.name, None, "its doc_offsets do not rise from 0 to tokens")]


def _damaged(
    entry: ShardEntry, stored: np.ndarray, computed: np.ndarray, offsets: np.ndarray
) -> list[Problem]:
    """What differs from when it was written, as precisely as the digests tell."""
    blocks = [Problem.in_block(entry, block) for block in np.flatnonzero(computed != stored).tolist()]
    if digest_content(computed, offsets) != entry.content_xxh3_128:
        return blocks or [Problem(entry.name, None, "its doc_offsets do not match their digest")]
    if blocks:
        return [Problem(entry.name, None, "its table of block digests is damaged, its tokens are intact")]
    return []


def _documents_end(tokens: np.ndarray, offsets: np.ndarray, block: int, eos_id: int) -> bool:
    """Whether every document that ends in this block does so with eos."""
    first = block * BLOCK_TOKENS
    # Of the offsets' own type: any other and numpy would convert the whole table for every block.
    bounds = np.array([first, first + len(tokens)], offsets.dtype)
    low, high = np.searchsorted(offsets, bounds, side="right")
    last = offsets[low:high] - np.uint64(first + 1)
    return bool((tokens[last.astype(np.int64)] == eos_id).all())
