"""Piles of documents -> shards of bounded size, cut between documents."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from hvdlm.corpus.piles import GROUP_DOCUMENTS, Pile
from hvdlm.data.entries import ShardEntry, TokenizerInfo
from hvdlm.data.shards import write_shard


@final
class ShardWriter:
    """Writes documents in the order they come, as many to a shard as fit.

    Args:
        stem: FOLDER/NAME for FOLDER/NAME-00000.h5 and so on.
        split: "train" or "val".
        shard_tokens: tokens a shard at most.
        tokenizer: what made the ids.
    """

    def __init__(self, stem: Path, split: str, *, shard_tokens: int, tokenizer: TokenizerInfo) -> None:
        self.entries: list[ShardEntry] = []
        self._stem, self._split, self._tokenizer = stem, split, tokenizer
        # Memory is touched, and so taken, only as far as it is filled.
        self._tokens = np.empty(shard_tokens, tokenizer.token_dtype)
        self._used = self._documents = 0
        self._lengths: list[np.ndarray] = []
        self._text_bytes = 0

    def add(self, pile: Pile, order: np.ndarray) -> None:
        """Append documents of a pile, none longer than a shard.

        Args:
            pile: where they lie.
            order: which ones, int64 [k].

        Raises:
            UserError: the disk is full.
        """
        lengths = pile.lengths[order].astype(np.int64)
        ends, first, done = np.cumsum(lengths), 0, 0
        while first < len(order):
            room = len(self._tokens) - self._used
            stop = int(np.searchsorted(ends, done + room, side="right"))
            stop = min(stop, first + GROUP_DOCUMENTS - self._documents)
            if stop == first:
                self.flush()
                continue
            size = int(ends[stop - 1]) - done
            pile.copy(order[first:stop], self._tokens[self._used : self._used + size])
            self._lengths.append(lengths[first:stop])
            self._text_bytes += int(pile.text_bytes[order[first:stop]].sum())
            self._documents += stop - first
            self._used, done, first = self._used + size, done + size, stop

    def flush(self) -> None:
        """Write what is pending as one shard.

        Raises:
            UserError: the disk is full.
        """
        if not self._used:
            return
        path = self._stem.with_name(f"{self._stem.name}-{len(self.entries):05d}.h5")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(self._lengths))])
        self.entries.append(
            write_shard(
                path,
                self._tokens[: self._used],
                offsets,
                split=self._split,
                text_bytes=self._text_bytes,
                tokenizer=self._tokenizer,
            )
        )
        self._used, self._documents, self._lengths, self._text_bytes = 0, 0, [], 0
