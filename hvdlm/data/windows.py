"""Reading windows of tokens by position: preadv into one buffer, every id checked."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
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
        self._shards = shards_of(sources, split)
        files = [(folder, entry.name, entry.file_bytes) for folder, entry in self._shards]
        self._files = OpenFiles(files, limit=max_open)
        tokenizer = sources[0].manifest.tokenizer
        self._vocab_size = tokenizer.vocab_size
        self._dtype = np.dtype(tokenizer.token_dtype)
        self._seq_len = seq_len
        self._resize(0)
        self._boundaries: Boundaries | None = None
        if with_positions:
            self._boundaries = Boundaries(self._shards, self._files, seq_len=seq_len)

    def read(
        self, shards: Sequence[int], firsts: Sequence[int], *, out: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """Read a batch of m windows, full or cut short by the end of their shard.

        Args:
            shards: m indices into the split's shards, through all sources.
            firsts: m first tokens.
            out: int64 [m, T + 1] to be filled and shared with the result; None = fresh memory.

        Returns:
            "tokens" and "labels", int64 [m, T]: views of one buffer, the labels one column further.
            Past the end of a short window tokens are 0 and labels -100. With positions also "positions",
            int64 [m, T], as `Boundaries.positions`.

        Raises:
            UserError: A file is missing, changed or broken, or holds an id that the tokenizer has not.
        """
        places, short = self._find(shards, firsts)
        buffer = np.empty((len(shards), self._seq_len + 1), np.int64) if out is None else out
        return self.read_at(shards, places, buffer, short)

    def read_at(
        self,
        shards: Sequence[int],
        places: Sequence[int],
        out: np.ndarray,
        short: Sequence[tuple[int, int]] = (),
    ) -> dict[str, torch.Tensor]:
        """The same where the places of the windows are known already.

        Args:
            shards: m indices into the split's shards.
            places: m byte offsets of the windows in their files.
            out: int64 [m, T + 1], filled and shared with the result.
            short: Row and number of ids of each window that is cut short.
        """
        if len(self._raw) != len(shards):
            self._resize(len(shards))
        if short or not self._read_full(shards, places):
            self._read_rows(shards, places, dict(short))
        # An id beyond the embedding would surface as an index error deep in the model. `max` takes longer:
        # it goes through Python and the machinery of ufuncs.
        if shards and self._ids.item(self._ids.argmax()) >= self._vocab_size:
            self._refuse_id(shards, places)
        out[...] = self._raw
        tokens, labels = out[:, :-1], out[:, 1:]
        if short:
            labels = labels.copy()
        for row, count in short:
            tokens[row, count - 1 :] = 0
            labels[row, count - 1 :] = IGNORED_LABEL
        # Slicing is numpy's: torch takes ten times as long.
        batch = {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if self._boundaries is not None:
            positions = self._boundaries.positions(shards, self.first_tokens(shards, places))
            batch["positions"] = torch.from_numpy(positions)
        return batch

    def first_tokens(self, shards: Sequence[int], places: Sequence[int]) -> list[int]:
        """The first token, in its shard, of each window at a byte offset."""
        offsets = (self._shards[shard][1].extents.tokens.offset for shard in shards)
        size = self._dtype.itemsize
        return [(place - offset) // size for place, offset in zip(places, offsets, strict=True)]

    def will_need(self, shard: int, first: int, tokens: int) -> None:
        """Tell the kernel that so many tokens of a shard will probably be read.

        A file that cannot be opened is left to the read: it may be one that nothing will be read from, and
        that was not staged.
        """
        offset, size = self._shards[shard][1].extents.tokens.offset, self._dtype.itemsize
        # A file system without such hints is read as it is.
        with contextlib.suppress(OSError, UserError):
            descriptor = self._files.get(shard)
            os.posix_fadvise(descriptor, offset + first * size, tokens * size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _find(self, shards: Sequence[int], firsts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The byte offset of each window in its file; row and number of ids of the short ones."""
        places, short, size = [], [], self._dtype.itemsize
        for index, (shard, first) in enumerate(zip(shards, firsts, strict=True)):
            _, entry = self._shards[shard]
            places.append(entry.extents.tokens.offset + first * size)
            if first + self._seq_len + 1 > entry.tokens:
                short.append((index, entry.tokens - first))
        return places, short

    def _path(self, shard: int) -> Path:
        folder, entry = self._shards[shard]
        return folder / entry.name

    def _resize(self, windows: int) -> None:
        """Make room for so many raw windows: `_raw` [m, T + 1], its rows as bytes, and all of it as one."""
        self._raw = np.empty((windows, self._seq_len + 1), self._dtype)
        self._rows = [(row.data.cast("B"),) for row in self._raw]
        self._ids = self._raw.reshape(-1)

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
            read_exactly(self._files.get(shard), row, place, self._path(shard))

    def _refuse_id(self, shards: Sequence[int], places: Sequence[int]) -> None:
        row, column = np.argwhere(self._raw >= self._vocab_size)[0].tolist()
        token = self.first_tokens(shards, places)[row] + column
        raise damaged(
            self._path(shards[row]),
            f"token {token} has id {self._raw[row, column]}, the tokenizer's ids end at "
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
