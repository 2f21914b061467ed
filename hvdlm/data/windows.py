"""Reading windows of tokens by position: preadv into one buffer, every id checked."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from hvdlm.config import UserError
from hvdlm.data.boundaries import Boundaries
from hvdlm.data.files import OpenFiles, damaged, read_exactly
from hvdlm.data.sources import Source, shards_of

IGNORED_LABEL = -100
"""A label that no loss counts; torch's cross entropy ignores it by default."""


@final
class WindowReader:
    """Reads windows of the shards of one split; for one thread.

    Args:
        sources: The data sets, of one tokenizer.
        split: "train" or "val".
        seq_len: T; a full window has T + 1 tokens.
        max_open: Files kept open at a time.
        with_positions: Also give the position of each token in its document.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        *,
        seq_len: int,
        max_open: int,
        with_positions: bool = False,
    ) -> None:
        shards = shards_of(sources, split)
        self._paths = [folder / entry.name for folder, entry in shards]
        self._extents = [(entry.extents.tokens.offset, entry.tokens) for _, entry in shards]
        sizes = [entry.file_bytes for _, entry in shards]
        self._files = OpenFiles(list(zip(self._paths, sizes, strict=True)), limit=max_open)
        tokenizer = sources[0].manifest.tokenizer
        self._vocab_size = tokenizer.vocab_size
        self._dtype = np.dtype(tokenizer.token_dtype)
        self._seq_len = seq_len
        self._raw = np.empty((0, seq_len + 1), self._dtype)
        self._rows: list[tuple[memoryview]] = []
        self._ids = self._raw.reshape(-1)
        self._boundaries: Boundaries | None = None
        if with_positions:
            entries = [entry for _, entry in shards]
            self._boundaries = Boundaries(self._paths, entries, self._files, seq_len=seq_len)

    def read(
        self,
        shards: Sequence[int],
        firsts: Sequence[int],
        *,
        places: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read a batch of m windows, full or cut short by the end of their shard.

        Args:
            shards: m indices into the split's shards, through all sources.
            firsts: m first tokens.
            places: m byte offsets of those tokens in their files, where all windows are full; None = they
                are found here.
            out: int64 [m, T + 1] to be filled and shared with the result; None = fresh memory.

        Returns:
            "tokens" and "labels", int64 [m, T]: views of one buffer, the labels one column further.
            Past the end of a short window tokens are 0 and labels -100. With positions also "positions",
            int64 [m, T], as `Boundaries.positions`.

        Raises:
            UserError: A file is missing, changed or broken, or holds an id that the tokenizer has not.
        """
        raw, short = self._fill(shards, firsts, places)
        buffer = np.empty(raw.shape, np.int64) if out is None else out
        buffer[...] = raw
        tokens, labels = buffer[:, :-1], buffer[:, 1:]
        if short:
            labels = labels.copy()
        for row, count in short:
            tokens[row, count - 1 :] = 0
            labels[row, count - 1 :] = IGNORED_LABEL
        # Slicing is numpy's: torch takes ten times as long.
        batch = {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if self._boundaries is not None:
            batch["positions"] = torch.from_numpy(self._boundaries.positions(shards, firsts))
        return batch

    def will_need(self, shard: int, first: int, tokens: int) -> None:
        """Tell the kernel that so many tokens of a shard will probably be read.

        A file that cannot be opened is left to the read: it may be one that nothing will be read from, and
        that was not staged.
        """
        offset, size = self._extents[shard][0], self._dtype.itemsize
        # A file system without such hints is read as it is.
        with contextlib.suppress(OSError, UserError):
            descriptor = self._files.get(shard)
            os.posix_fadvise(descriptor, offset + first * size, tokens * size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _fill(
        self, shards: Sequence[int], firsts: Sequence[int], places: Sequence[int] | None
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The raw ids [m, T + 1], zero after a short window; row and number of ids of the short ones.

        The array is filled anew by the next call.
        """
        if len(self._raw) != len(shards):
            self._raw = np.empty((len(shards), self._seq_len + 1), self._dtype)
            self._rows = [(row.data.cast("B"),) for row in self._raw]
            self._ids = self._raw.reshape(-1)
        short = list[tuple[int, int]]()
        if places is None:
            places, short = self._find(shards, firsts)
        if short or not self._read_full(shards, places):
            self._read_rows(shards, places, dict(short))
        # An id beyond the embedding would surface as an index error deep in the model. `max` takes longer:
        # it goes through Python and the machinery of ufuncs.
        if len(shards) and self._ids.item(self._ids.argmax()) >= self._vocab_size:
            self._refuse_id(self._raw, shards, firsts)
        return self._raw, short

    def _find(self, shards: Sequence[int], firsts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The byte offset of each window in its file; row and number of ids of the short ones."""
        places, short, size = [], [], self._dtype.itemsize
        for index, (shard, first) in enumerate(zip(shards, firsts, strict=True)):
            offset, tokens = self._extents[shard]
            places.append(offset + first * size)
            if first + self._seq_len + 1 > tokens:
                short.append((index, tokens - first))
        return places, short

    def _read_full(self, shards: Sequence[int], places: Sequence[int]) -> bool:
        """Read full windows, one system call each; False: some file is not open yet, or gave less.

        Mapped, because whatever Python does for each window is felt in the loader's speed.
        """
        try:
            # All of them before the first is read from: what one that is missing ends would be read again.
            fds = list(map(self._files.fds.__getitem__, shards))
            return sum(map(os.preadv, fds, self._rows, places)) == self._raw.nbytes
        except (KeyError, OSError):
            return False

    def _read_rows(self, shards: Sequence[int], places: Sequence[int], short: dict[int, int]) -> None:
        """Read windows one by one: their files are opened, an error says where; zeros after a short one."""
        for index, (shard, place) in enumerate(zip(shards, places, strict=True)):
            count = short.get(index, self._seq_len + 1)
            self._raw[index, count:] = 0
            row = self._rows[index][0][: count * self._dtype.itemsize]
            read_exactly(self._files.get(shard), row, place, self._paths[shard])

    def _refuse_id(self, raw: np.ndarray, shards: Sequence[int], firsts: Sequence[int]) -> None:
        row, column = np.argwhere(raw >= self._vocab_size)[0].tolist()
        path = self._paths[shards[row]]
        raise damaged(
            path,
            f"token {firsts[row] + column} has id {raw[row, column]}, the tokenizer's ids end at "
            f"{self._vocab_size - 1}: damaged",
        )


@final
class Recycler:
    """Arrays of one shape, handed out again once nothing outside refers to them or their views.

    Fresh memory costs more than reading into it: the allocator gives pages back and the kernel
    clears them anew (75 page faults for 16 windows of 2048 tokens: 260 us instead of 80).
    For one thread only.

    Args:
        shape: Of each array, int64.
        limit: Arrays remembered; beyond it they are fresh.
    """

    def __init__(self, shape: tuple[int, ...], *, limit: int) -> None:
        self._shape, self._limit = shape, limit
        self._arrays: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An int64 array of undefined content."""
        for array in self._arrays:
            # The list, this name and the argument refer to it; a view, or a tensor over one, is a fourth.
            if sys.getrefcount(array) == 3:
                return array
        array = np.empty(self._shape, np.int64)
        if len(self._arrays) < self._limit:
            self._arrays.append(array)
        return array
