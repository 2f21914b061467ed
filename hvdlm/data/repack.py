"""Chunks of documents -> shards of bounded size, with one shard of tokens in memory."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from hvdlm.data.chunks import CHUNK_TOKENS, Chunk
from hvdlm.data.entries import ShardEntry, TokenizerInfo
from hvdlm.data.shards import write_shard


@final
class Repacker:
    """Writes the documents of one split in the order they come, as many to a shard as fit.

    A document longer than a shard is cut after every `shard_tokens` - 1 tokens, each part ending
    with eos.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        shard_tokens: int,
        tokenizer: TokenizerInfo,
        id_bytes: np.ndarray,
    ) -> None:
        """Args:
        folder: Gets SPLIT-00000.h5 and so on.
        split: "train" or "val".
        shard_tokens: Tokens a shard at most.
        tokenizer: What made the ids.
        id_bytes: int64 [vocab_size], UTF-8 bytes of text that each id stands for.
        """
        self.entries: list[ShardEntry] = []
        self._folder, self._split, self._tokenizer, self._id_bytes = folder, split, tokenizer, id_bytes
        # Memory that was never written to is not taken from the machine.
        self._tokens = np.empty(shard_tokens, tokenizer.token_dtype)
        self._used = 0
        self._ends: list[np.ndarray] = []

    def add(self, chunk: Chunk) -> None:
        """Append tokens; a document that goes on in the next chunk goes on there.

        Args:
            chunk: Of documents that end with eos.

        Raises:
            UserError: The disk is full.
        """
        first = 0
        while first < len(chunk.tokens):
            if self._used == len(self._tokens):
                self._make_room()
            part = chunk.tokens[first : first + len(self._tokens) - self._used]
            self._tokens[self._used : self._used + len(part)] = part
            low, high = np.searchsorted(chunk.ends, [first, first + len(part)], "right")
            self._ends.append(chunk.ends[low:high] - first + self._used)
            self._used += len(part)
            first += len(part)

    def close(self) -> None:
        """Write what is left; the last document has ended.

        Raises:
            UserError: The disk is full.
        """
        if self._used:
            self._flush(np.concatenate(self._ends))

    def _make_room(self) -> None:
        ends = np.concatenate(self._ends)
        if len(ends):
            self._flush(ends)
            return
        # One document fills the shard and goes on: its last token here makes place for eos.
        last = self._tokens[-1]
        self._tokens[-1] = self._tokenizer.eos_id
        self._flush(np.array([self._used]))
        self._tokens[0], self._used = last, 1

    def _flush(self, ends: np.ndarray) -> None:
        """Write the documents that end here, and keep the beginning of the next."""
        stop = int(ends[-1])
        tokens = self._tokens[:stop]
        entry = write_shard(
            self._folder / f"{self._split}-{len(self.entries):05d}.h5",
            tokens,
            np.concatenate([np.zeros(1, np.int64), ends]),
            split=self._split,
            text_bytes=self._text_bytes(tokens),
            tokenizer=self._tokenizer,
        )
        self.entries.append(entry)
        self._used -= stop
        self._tokens[: self._used] = self._tokens[stop : stop + self._used]
        self._ends = []

    def _text_bytes(self, tokens: np.ndarray) -> int:
        starts = range(0, len(tokens), CHUNK_TOKENS)
        return sum(int(self._id_bytes[tokens[start : start + CHUNK_TOKENS]].sum()) for start in starts)
