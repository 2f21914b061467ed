"""Are the tokens and documents on disk those that were written? Digests, compared while training runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.digests import digest_block, digest_content
from hvdlm.data.entries import BLOCK_TOKENS, SPLITS, ShardEntry
from hvdlm.data.extents import read_block, read_whole
from hvdlm.data.files import cure, open_checked
from hvdlm.data.intervals import Intervals, at_positions, gaps, size, within
from hvdlm.data.manifest import Manifest
from hvdlm.data.order import share_of
from hvdlm.data.sources import Source

BACKGROUND_BYTES_PER_S = 128e6
"""Reading speed of a background verification: a few percent of one core."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of a data set: in one block of its tokens, or (None) elsewhere.

    `says_cure`: the message says what to do.
    """

    file: str
    block: int | None
    message: str
    says_cure: bool = False

    @staticmethod
    def in_block(entry: ShardEntry, block: int) -> Problem:
        """A block whose tokens do not match their digest."""
        first, end = block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, entry.tokens)
        return Problem(entry.name, block, f"tokens {first} to {end - 1} do not match their digest")

    @staticmethod
    def unreadable(path: Path, error: Exception) -> Problem:
        """A file that could not be checked."""
        message = str(error).removeprefix(f"{path}: ")
        return Problem(path.name, None, message, says_cure=isinstance(error, UserError))

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"

    @property
    def detail(self) -> str:
        """Everything but the file."""
        return self.message if self.block is None else f"block {self.block}: {self.message}"


def block_count(manifest: Manifest) -> int:
    """Blocks of a data set: they are numbered through all shards of the manifest in its order."""
    return sum(entry.extents.block_xxh3.size for entry in manifest.shards)


def verify_blocks(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int],
    known: Intervals | None = None,
    bytes_per_s: float = 0.0,
    stop: threading.Event | None = None,
) -> Iterator[Problem]:
    """Compare the blocks of tokens of one share, over all splits, with their digests, without HDF5.

    Args:
        folder: The data set.
        manifest: Its manifest.
        share: (index, parts): each block belongs to exactly one index; doc_offsets go with the first block.
        known: Blocks that are left out; the others are shared.
        bytes_per_s: Reads no faster; 0 = as fast as it goes.
        stop: Ends it early.

    Yields:
        One problem for each bad block, one for each unreadable shard.
    """
    brake = _Brake(bytes_per_s, stop or threading.Event())
    verdicts = _verdicts(folder, manifest, _share_of_unknown(manifest, share, known or []), brake)
    return (problem for problem in verdicts if problem)


def require_intact(
    source: Source,
    *,
    share: tuple[int, int],
    splits: Collection[str] = SPLITS,
    stop: threading.Event | None = None,
) -> None:
    """Compare one share of the blocks of some splits, as fast as it goes, unless `stop` ends it early.

    Raises:
        UserError: One is bad, or cannot be read.
    """
    shards = tuple(entry for entry in source.manifest.shards if entry.split in splits)
    manifest = replace(source.manifest, shards=shards)
    for problem in verify_blocks(source.folder, manifest, share=share, stop=stop):
        raise UserError(_told(source.folder, problem))


def _told(folder: Path, problem: Problem) -> str:
    """A problem with its place and what to do."""
    return f"{folder / problem.file}: {problem.detail}{'' if problem.says_cure else f'; {cure(folder)}'}"


@final
class BackgroundVerifier:
    """Does as `verify_blocks` once, over all sources, in a thread; the training loop asks for the outcome.

    Args:
        sources: The data sets.
        share: (rank, ranks): everybody checks other blocks.
        known: Blocks of each source that are left out; the others are shared.
        bytes_per_s: Reads no faster.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        share: tuple[int, int],
        known: Sequence[Intervals] = (),
        bytes_per_s: float = BACKGROUND_BYTES_PER_S,
    ) -> None:
        known = known or [[] for _ in sources]
        self._shares = [
            (source, _share_of_unknown(source.manifest, share, blocks))
            for source, blocks in zip(sources, known, strict=True)
        ]
        self._stop = threading.Event()
        self._problem: str | None = None
        self._intact = [0] * len(sources)
        self._thread = threading.Thread(target=self._run, args=(bytes_per_s,), name="verify", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """The first thing found wrong, with the cure; None so far."""
        return self._problem

    def intact(self) -> list[Intervals]:
        """The blocks of this share that match their digests, so far, of each source."""
        counts = zip(self._shares, self._intact, strict=True)
        return [at_positions(own, range(count)) for (_, own), count in counts]

    def done(self) -> bool:
        """Whether this share was checked to its end, or to its first problem."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop; a thread that hangs in a read is left behind after 5 s."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self, bytes_per_s: float) -> None:
        brake = _Brake(bytes_per_s, self._stop)
        for index, (source, own) in enumerate(self._shares):
            folder = source.folder
            try:
                for problem in _verdicts(folder, source.manifest, own, brake):
                    if problem:
                        self._problem = _told(folder, problem)
                        return
                    self._intact[index] += 1
            except Exception as error:
                self._problem = f"{folder}: verification failed: {error!r}"
                return


@final
class _Brake:
    """Holds a reader to a speed."""

    def __init__(self, bytes_per_s: float, stop: threading.Event) -> None:
        self._bytes_per_s, self._stop = bytes_per_s, stop
        self._due_s = time.monotonic()

    def stopped_after(self, read_bytes: int) -> bool:
        """Wait until so many bytes more were allowed; True if asked to stop meanwhile."""
        if self._bytes_per_s:
            self._due_s = max(self._due_s, time.monotonic() - 1.0) + read_bytes / self._bytes_per_s
            return self._stop.wait(max(0.0, self._due_s - time.monotonic()))
        return self._stop.is_set()


def _share_of_unknown(manifest: Manifest, share: tuple[int, int], known: Intervals) -> Intervals:
    unknown = gaps(known, block_count(manifest))
    return at_positions(unknown, share_of(size(unknown), share))


def _verdicts(folder: Path, manifest: Manifest, own: Intervals, brake: _Brake) -> Iterator[Problem | None]:
    """What is wrong with each block in turn; one verdict alone for a shard that cannot be read on."""
    before = 0
    for entry in manifest.shards:
        end = before + entry.extents.block_xxh3.size
        blocks = [block - before for block in within(own, before, end)]
        before = end
        if blocks and not brake.stopped_after(0):
            try:
                yield from _shard_verdicts(folder / entry.name, entry, blocks, brake)
            except UserError as error:
                yield Problem.unreadable(folder / entry.name, error)


def _shard_verdicts(
    path: Path, entry: ShardEntry, blocks: list[int], brake: _Brake
) -> Iterator[Problem | None]:
    fd = open_checked(path, entry.file_bytes)
    try:
        stored = read_whole(fd, path, entry.extents.block_xxh3)
        for block in blocks:
            tokens = read_block(fd, path, entry, block)
            intact = digest_block(tokens) == int(stored[block])
            problem = None if intact else Problem.in_block(entry, block)
            if intact and block == 0:
                problem = _table_problem(fd, path, entry, stored)
            yield problem
            if brake.stopped_after(tokens.nbytes):
                return
    finally:
        os.close(fd)


def _table_problem(fd: int, path: Path, entry: ShardEntry, stored: np.ndarray) -> Problem | None:
    """Whether a shard's tables are those of its content digest: /doc_offsets and the block digests."""
    offsets = read_whole(fd, path, entry.extents.doc_offsets)
    if digest_content(stored, offsets) == entry.content_xxh3_128:
        return None
    return Problem(entry.name, None, "its doc_offsets or its block digests are damaged")
