"""Tokens that wait in a file until it is known what shard they make: memory does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np

from hvdlm.data.files import read_exactly, unwritable, write_exactly

_MOVED_TOKENS = 1 << 20


@final
class Spool:
    """A queue of tokens: appended at the end, read anywhere, dropped from the beginning.

    A context manager; its file stays, for whoever removes the folder.

    Args:
        path: made, or emptied.
        dtype: numpy name of the type of the tokens.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype, self._used = path, np.dtype(dtype), 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read some tokens, [t]."""
        first, stop, _ = part.indices(self._used)
        tokens = np.empty(max(0, stop - first), self._dtype)
        read_exactly(self._fd, tokens.data.cast("B"), first * self._dtype.itemsize, self._path)
        return tokens

    def blocks(self, count: int, size: int) -> Iterator[np.ndarray]:
        """Read the first `count` tokens, `size` of them at a time."""
        return (self[first : min(first + size, count)] for first in range(0, count, size))

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens at the end.

        Args:
            tokens: integers [t] that the spool's type can hold.

        Raises:
            UserError: The disk is full.
        """
        self._write(tokens, self._used)
        self._used += len(tokens)

    def pop(self) -> int:
        """Take the last token away."""
        last = int(self[self._used - 1 :][0])
        self._used -= 1
        return last

    def drop(self, count: int) -> None:
        """Take the first tokens away.

        Raises:
            UserError: The disk is full.
        """
        for first in range(count, self._used, _MOVED_TOKENS):
            self._write(self[first : first + _MOVED_TOKENS], first - count)
        self._used -= count

    def _write(self, tokens: np.ndarray, first: int) -> None:
        raw = np.ascontiguousarray(tokens, self._dtype).data.cast("B")
        try:
            write_exactly(self._fd, raw, first * self._dtype.itemsize)
        except OSError as error:
            raise unwritable(self._path, error) from error
