"""Are the tokens and documents on disk those that were written? Digests, compared while training runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdlm.config import UserError
from hvdlm.data.digests import digest_block, digest_content
from hvdlm.data.entries import BLOCK_TOKENS, ShardEntry
from hvdlm.data.extents import read_block, read_whole
from hvdlm.data.files import cure, open_checked
from hvdlm.data.manifest import Manifest
from hvdlm.data.order import share_of

BACKGROUND_BYTES_PER_S = 128e6
"""Reading speed of a background verification: a few percent of one core."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of a data set: in one block of its tokens, or (None) elsewhere."""

    file: str
    block: int | None
    message: str

    @staticmethod
    def in_block(entry: ShardEntry, block: int) -> Problem:
        """A block whose tokens do not match their digest."""
        first, end = block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, entry.tokens)
        return Problem(entry.name, block, f"tokens {first} to {end - 1} do not match their digest")

    @staticmethod
    def unreadable(path: Path, error: Exception) -> Problem:
        """A file that could not be checked."""
        return Problem(path.name, None, str(error).removeprefix(f"{path}: "))

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"

    @property
    def detail(self) -> str:
        """Everything but the file."""
        return self.message if self.block is None else f"block {self.block}: {self.message}"


def verify_blocks(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int],
    bytes_per_s: float = 0.0,
    stop: threading.Event | None = None,
) -> Iterator[Problem]:
    """Compare the blocks of tokens of one share, over all splits, with their digests, without HDF5.

    Args:
        folder: The data set.
        manifest: Its manifest.
        share: (index, parts): each block belongs to exactly one index; doc_offsets go with the first block.
        bytes_per_s: Reads no faster; 0 = as fast as it goes.
        stop: Ends it early.

    Yields:
        One problem for each bad block, one for each unreadable shard.
    """
    stop = stop or threading.Event()
    counts = [entry.extents.block_xxh3.size for entry in manifest.shards]
    own, before = share_of(sum(counts), share), 0
    for entry, count in zip(manifest.shards, counts, strict=True):
        blocks = range(max(own.start - before, 0), min(own.stop - before, count))
        before += count
        if blocks and not stop.is_set():
            try:
                yield from _block_problems(folder / entry.name, entry, blocks, _Brake(bytes_per_s, stop))
            except UserError as error:
                yield Problem.unreadable(folder / entry.name, error)


@final
class BackgroundVerifier:
    """Runs `verify_blocks` once in a thread; the training loop asks for the outcome.

    Args:
        folder: The data set.
        manifest: Its manifest.
        share: (rank, ranks): everybody checks other blocks.
        bytes_per_s: Reads no faster.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        share: tuple[int, int],
        bytes_per_s: float = BACKGROUND_BYTES_PER_S,
    ) -> None:
        self._stop = threading.Event()
        self._problem: str | None = None
        self._thread = threading.Thread(
            target=self._run, args=(folder, manifest, share, bytes_per_s), name="verify", daemon=True
        )
        self._thread.start()

    def problem(self) -> str | None:
        """The first thing found wrong, with the cure; None so far."""
        return self._problem

    def done(self) -> bool:
        """Whether this share was checked to its end, or to its first problem."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop; a thread that hangs in a read is left behind after 5 s."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self, folder: Path, manifest: Manifest, share: tuple[int, int], bytes_per_s: float) -> None:
        try:
            for problem in verify_blocks(
                folder, manifest, share=share, bytes_per_s=bytes_per_s, stop=self._stop
            ):
                self._problem = f"{folder / problem.file}: {problem.detail}; {cure(folder)}"
                return
        except Exception as error:
            self._problem = f"{folder}: verification failed: {error!r}"


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


def _block_problems(path: Path, entry: ShardEntry, blocks: range, brake: _Brake) -> Iterator[Problem]:
    fd = open_checked(path, entry.file_bytes)
    try:
        stored, damaged = read_whole(fd, path, entry.extents.block_xxh3), False
        for block in blocks:
            tokens = read_block(fd, path, entry, block)
            if digest_block(tokens) != int(stored[block]):
                damaged = True
                yield Problem.in_block(entry, block)
            if brake.stopped_after(tokens.nbytes):
                return
        if blocks.start == 0 and not damaged:
            offsets = read_whole(fd, path, entry.extents.doc_offsets)
            if digest_content(stored, offsets) != entry.content_xxh3_128:
                yield Problem(entry.name, None, "its doc_offsets or its block digests are damaged")
            brake.stopped_after(offsets.nbytes)
    finally:
        os.close(fd)
