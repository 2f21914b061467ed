"""Encoded documents on disk: written as they come, read back in any order, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import final

import numpy as np

from hvdlm.data.files import publishing, read_exactly

_SUFFIXES = (".tokens", ".lengths", ".bytes")
_FLUSH_TOKENS, _FLUSH_DOCUMENTS = 1 << 20, 1 << 16
GROUP_DOCUMENTS = 4 << 20
"""Documents, at most, that are shuffled together and that a shard has: about 80 bytes each meanwhile.

Part of format version 1: a task of more documents would come out with other bytes.
"""


@final
class PileWriter:
    """Appends encoded documents to three files; a context manager that closes them.

    A document longer than a shard is cut after every `limit` tokens; each part ends with eos and has
    its share of the text's bytes.

    Args:
        stem: FOLDER/NAME for FOLDER/NAME.tokens and so on.
        eos_id: id that ends every document.
        dtype: of the tokens.
        limit: tokens of a document at most, without eos.
    """

    def __init__(self, stem: Path, *, eos_id: int, dtype: np.dtype, limit: int) -> None:
        self._limit = limit
        self._eos = np.array([eos_id], dtype)
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(_beside(stem, s).open("wb")) for s in _SUFFIXES]
        self._arrays: list[np.ndarray] = []
        self._array_tokens = 0
        self._lengths: list[int] = []
        self._text_bytes: list[int] = []
        self._parts = [0]

    def __enter__(self) -> PileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, ids: np.ndarray) -> None:
        """Append to the document that is being written.

        Raises:
            OSError: the disk is full.
        """
        while len(ids):
            room = self._limit - self._parts[-1]
            if room == 0:
                self._append(self._eos)
                self._parts.append(0)
                continue
            self._append(ids[:room])
            self._parts[-1] += min(room, len(ids))
            ids = ids[room:]

    def end(self, text_bytes: int) -> None:
        """End the document.

        Args:
            text_bytes: UTF-8 bytes of its text.
        """
        self._append(self._eos)
        total = sum(self._parts)
        stop = before = 0
        for part in self._parts:
            stop += part
            upto = text_bytes if stop == total else text_bytes * stop // total
            self._lengths.append(part + 1)
            self._text_bytes.append(upto - before)
            before = upto
        self._parts = [0]
        if len(self._lengths) >= _FLUSH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; only between documents is the pile whole.

        Raises:
            OSError: the disk is full.
        """
        self._flush_tokens()
        for file, values in ((self._files[1], self._lengths), (self._files[2], self._text_bytes)):
            file.write(np.array(values, "<u4").data)
            file.flush()
            values.clear()
        self._files[0].flush()

    def _append(self, ids: np.ndarray) -> None:
        self._arrays.append(ids)
        self._array_tokens += len(ids)
        if self._array_tokens >= _FLUSH_TOKENS:
            self._flush_tokens()

    def _flush_tokens(self) -> None:
        if self._arrays:
            # Not numpy's own writers: they report a full disk without an errno.
            self._files[0].write(np.concatenate(self._arrays).data)
            self._arrays, self._array_tokens = [], 0


@final
class Pile:
    """Documents that a `PileWriter` wrote, a group of them; a context manager that closes them.

    Args:
        stem: as there.
        dtype: as there.
        first: the group's first document.
        first_token: where it begins.

    Attributes:
        lengths: uint32 [n], tokens of each document, eos included.
        text_bytes: uint32 [n], UTF-8 bytes of each document.
        end_token: after the last document.
    """

    def __init__(self, stem: Path, dtype: np.dtype, first: int = 0, first_token: int = 0) -> None:
        self._path, self._dtype = _beside(stem, ".tokens"), dtype
        self.lengths, self.text_bytes = (
            np.fromfile(_beside(stem, suffix), "<u4", GROUP_DOCUMENTS, offset=4 * first)
            for suffix in (".lengths", ".bytes")
        )
        ends = np.cumsum(self.lengths, dtype=np.int64) + first_token
        self.end_token = int(ends[-1]) if len(ends) else first_token
        self._starts = (ends - self.lengths) * dtype.itemsize
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Pile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def copy(self, order: np.ndarray, out: np.ndarray) -> None:
        """Read documents in some order.

        Args:
            order: their indices in the group, int64 [k].
            out: of the pile's dtype, with room for exactly these documents.
        """
        view, start = out.view(np.uint8).data, 0
        for at in range(0, len(order), _FLUSH_DOCUMENTS):
            chosen = order[at : at + _FLUSH_DOCUMENTS]
            sizes = (self.lengths[chosen].astype(np.int64) * self._dtype.itemsize).tolist()
            for first, size in zip(self._starts[chosen].tolist(), sizes, strict=True):
                read_exactly(self._fd, view[start : start + size], first, self._path)
                start += size


def groups(stem: Path, dtype: np.dtype) -> Iterator[Pile]:
    """A pile in groups of `GROUP_DOCUMENTS`, in the order in which it was written; one at least."""
    documents, first_token = _beside(stem, ".lengths").stat().st_size // 4, 0
    for first in range(0, max(documents, 1), GROUP_DOCUMENTS):
        with Pile(stem, dtype, first, first_token) as pile:
            yield pile
            first_token = pile.end_token


def save_in_order(parts: Iterable[tuple[Pile, np.ndarray]], stem: Path, dtype: np.dtype) -> None:
    """Write groups of a pile anew, each in another order, durably.

    Args:
        parts: a group and the order of its documents, int64 [n].
        stem: of the new pile.
        dtype: of the tokens.

    Raises:
        UserError: the disk is full.
    """
    with ExitStack() as stack:
        temps = [stack.enter_context(publishing(_beside(stem, s))) for s in _SUFFIXES]
        tokens, lengths, sizes = (stack.enter_context(temp.open("xb")) for temp in temps)
        for pile, order in parts:
            for chosen in np.array_split(order, max(1, -(-int(pile.lengths.sum()) // _FLUSH_TOKENS))):
                out = np.empty(int(pile.lengths[chosen].sum()), dtype)
                pile.copy(chosen, out)
                tokens.write(out.data)
            lengths.write(pile.lengths[order].data)
            sizes.write(pile.text_bytes[order].data)


def count_tokens(stem: Path, dtype: np.dtype) -> int:
    """Tokens of a pile, eos included."""
    return _beside(stem, ".tokens").stat().st_size // dtype.itemsize


def is_whole(stem: Path, dtype: np.dtype, *, documents: int, tokens: int) -> bool:
    """Whether a pile's files have the sizes that so many documents take."""
    try:
        sizes = [_beside(stem, suffix).stat().st_size for suffix in _SUFFIXES]
    except FileNotFoundError:
        return False
    return sizes == [tokens * dtype.itemsize, 4 * documents, 4 * documents]


def remove(stem: Path) -> None:
    """Delete a pile's files."""
    for suffix in _SUFFIXES:
        _beside(stem, suffix).unlink(missing_ok=True)


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}{suffix}")
