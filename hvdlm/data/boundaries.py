"""Where documents begin inside a window, looked up in /doc_offsets on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.entries import ShardEntry
from hvdlm.data.extents import read_part
from hvdlm.data.files import OpenFiles, damaged

PAGE_OFFSETS = 1024
"""Offsets a read (8 KiB): the first guess hits in most shards of shuffled documents."""


@final
class Boundaries:
    """Finds the documents of windows of one split; for one thread.

    /doc_offsets is searched on disk, by interpolation, and nothing of it is kept: memory does not
    depend on the number of documents or shards. A small read or two a window where documents lie shuffled.

    Args:
        shards: The split's, as `shards_of`.
        files: The same shards, opened at need; whoever made it closes it.
        seq_len: T.
    """

    def __init__(self, shards: Sequence[tuple[Path, ShardEntry]], files: OpenFiles, *, seq_len: int) -> None:
        self._entries, self._files, self._seq_len = [entry for _, entry in shards], files, seq_len
        # Made for each read, they would take as long as what is read.
        self._paths = [folder / entry.name for folder, entry in shards]

    def positions(self, shards: Sequence[int], firsts: Sequence[int]) -> np.ndarray:
        """The position of each token in its document, counted from the window's start at the earliest.

        Args:
            shards: m indices into the split's shards.
            firsts: m first tokens.

        Returns:
            int64 [m, T]: 0 at the window's start, at each document's first token and at the shard's
            end; behind that they count on.

        Raises:
            UserError: A file is missing, changed or broken, or its /doc_offsets cannot be right.
        """
        seq_len = self._seq_len
        starts = [
            self.starts(shard, first) + row * seq_len
            for row, (shard, first) in enumerate(zip(shards, firsts, strict=True))
        ]
        # All rows as one: the stretch from each start to the next is numbered from it.
        begin, tokens = np.concatenate(starts), len(starts) * seq_len
        positions = np.repeat(begin, np.diff(begin, append=tokens))
        np.subtract(np.arange(tokens), positions, out=positions)
        return positions.reshape(len(starts), seq_len)

    def starts(self, shard: int, first: int) -> np.ndarray:
        """Where the documents of one window begin in it.

        Args:
            shard: Index into the split's shards.
            first: Token of the shard where the window begins.

        Returns:
            int64 [documents], rising from 0, below T; the shard's end counts as a document.

        Raises:
            UserError: As `positions`.
        """
        end = first + self._seq_len
        at, page = self._find(shard, first)
        pages = [page[page.searchsorted(first, "right") - 1 :]]
        while page[-1] < end and at + len(page) <= self._entries[shard].documents:
            at += len(page)
            page = self._read(shard, at)
            if page[0] <= pages[-1][-1]:
                raise self._damage(shard)
            pages.append(page)
        offsets = pages[0] if len(pages) == 1 else np.concatenate(pages)
        starts = offsets[: offsets.searchsorted(end)] - first
        starts[0] = 0  # The document that the window begins in may have begun before.
        return starts

    def _find(self, shard: int, first: int) -> tuple[int, np.ndarray]:
        """Offsets around token `first`, some at or before it and some after; and the index of the first.

        Every other guess halves what is left, so that the worst order of documents costs a logarithm.
        """
        entry = self._entries[shard]
        low, high, low_token, high_token = 0, entry.documents, 0, entry.tokens
        halve = False
        while low < high:
            part, whole = (1, 2) if halve else (first - low_token, high_token - low_token)
            at = max(low, low + (high - low) * part // whole - PAGE_OFFSETS // 2)
            page = self._read(shard, at)
            if page[0] > first:
                high, high_token = at, int(page[0])
            elif page[-1] <= first:
                low, low_token = at + len(page) - 1, int(page[-1])
            else:
                return at, page
            halve = not halve
        raise self._damage(shard)

    def _read(self, shard: int, at: int) -> np.ndarray:
        """The offsets from index `at` on, a page or as many as there are: int64, rising, in the shard.

        One that is wrong and yet possible is for the verification to find.
        """
        entry, path = self._entries[shard], self._paths[shard]
        size = min(PAGE_OFFSETS, entry.documents + 1 - at)
        # Signed, what is 2^63 or more does not rise.
        page = read_part(self._files.get(shard), path, entry.extents.doc_offsets, first=at, size=size)
        page = page.view("<i8")
        after = entry.documents + 1 - at - size
        # A document has a token at least.
        possible = at <= page[0] and page[-1] <= entry.tokens - after
        if not possible or not (page[1:] > page[:-1]).all():
            raise self._damage(shard)
        if (at == 0 and page[0] != 0) or (after == 0 and page[-1] != entry.tokens):
            raise self._damage(shard)
        return page

    def _damage(self, shard: int) -> UserError:
        path, tokens = self._paths[shard], self._entries[shard].tokens
        return damaged(path, f"its doc_offsets do not rise from 0 to {tokens}: damaged")
