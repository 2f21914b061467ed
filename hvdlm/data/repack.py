"""Chunks of documents -> shards of bounded size; what is not yet one waits on disk."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from hvdlm.data.chunks import Chunk
from hvdlm.data.entries import BLOCK_TOKENS, ShardEntry, TokenizerInfo
from hvdlm.data.files import TEMP_PREFIX
from hvdlm.data.shards import write_blocks
from hvdlm.data.spool import Spool


@final
class Repacker:
    """Writes the documents of one split in the order they come, as many to a shard as fit.

    A context manager, which closes its file; `close` writes the last shard. A document longer than
    a shard is cut after every `shard_tokens` - 1 tokens, each part ending with eos.
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
        self._shard_tokens = shard_tokens
        self._tokens = Spool(folder / f"{TEMP_PREFIX}{split}", tokenizer.token_dtype)
        self._ends: list[np.ndarray] = []

    def __enter__(self) -> Repacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.__exit__()

    def add(self, chunk: Chunk) -> None:
        """Append tokens; a document that goes on in the next chunk goes on there.

        Args:
            chunk: Of documents that end with eos.

        Raises:
            UserError: The disk is full.
        """
        first = 0
        while first < len(chunk.tokens):
            used = len(self._tokens)
            if used == self._shard_tokens:
                self._make_room()
                continue
            part = chunk.tokens[first : first + self._shard_tokens - used]
            self._tokens.append(part)
            low, high = np.searchsorted(chunk.ends, [first, first + len(part)], "right")
            self._ends.append(chunk.ends[low:high] - first + used)
            first += len(part)

    def close(self) -> None:
        """Write what is left; the last document has ended.

        Raises:
            UserError: The disk is full.
        """
        if len(self._tokens):
            self._flush(np.concatenate(self._ends))

    def _make_room(self) -> None:
        ends = np.concatenate(self._ends)
        if len(ends):
            self._flush(ends)
            return
        # One document fills the shard and goes on: its last token here makes place for eos.
        last = self._tokens.pop()
        self._tokens.append(np.array([self._tokenizer.eos_id]))
        self._flush(np.array([len(self._tokens)]))
        self._tokens.append(np.array([last]))

    def _flush(self, ends: np.ndarray) -> None:
        """Write the documents that end here, and keep the beginning of the next."""
        stop = int(ends[-1])
        text_bytes = sum(int(self._id_bytes[b].sum()) for b in self._tokens.blocks(stop, BLOCK_TOKENS))
        entry = write_blocks(
            self._folder / f"{self._split}-{len(self.entries):05d}.h5",
            self._tokens.blocks(stop, BLOCK_TOKENS),
            np.concatenate([np.zeros(1, np.int64), ends]),
            split=self._split,
            text_bytes=text_bytes,
            tokenizer=self._tokenizer,
        )
        self.entries.append(entry)
        self._tokens.drop(stop)
        self._ends = []
