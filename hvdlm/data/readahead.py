"""Telling the kernel which chunks will be read, so that the file system sees large sequential reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import final

import numpy as np

from hvdlm.data.blend import first_of
from hvdlm.data.locality import Chunks
from hvdlm.data.order import locate
from hvdlm.data.windows import WindowReader


@final
class ReadAhead:
    """Announces each chunk when it is first touched; for one thread.

    Args:
        reader: What will read.
        counts: Windows of each source.
        first: int64 [shards + 1], first window of each shard.
        chunks: How sources are cut.
        seq_len: T.
    """

    def __init__(
        self, reader: WindowReader, counts: Sequence[int], first: np.ndarray, *, chunks: Chunks, seq_len: int
    ) -> None:
        self._reader, self._first, self._chunks, self._seq_len = reader, first, chunks, seq_len
        self._starts = first_of(counts)
        self._ends = self._starts + counts
        # An epoch touches a chunk during one group; a group ago it may have left the page cache.
        self._limit = 2 * chunks.group * len(counts)
        self._announced: OrderedDict[int, None] = OrderedDict()

    def announce(self, shards: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> None:
        """Hint the chunks of a step's windows, given as shards and byte offsets of each slot."""
        tokens = [self._reader.first_tokens(*slot) for slot in zip(shards, places, strict=True)]
        windows = self._first[np.array(shards).ravel()] + np.array(tokens).ravel() // self._seq_len
        sources = np.searchsorted(self._ends, windows, side="right")
        starts = self._starts[sources]
        chunks = starts + (windows - starts) // self._chunks.windows * self._chunks.windows
        for chunk, source in sorted(set(zip(chunks.tolist(), sources.tolist(), strict=True))):
            if chunk not in self._announced:
                self._hint(chunk, min(chunk + self._chunks.windows, int(self._ends[source])))
            self._announced[chunk] = None
            self._announced.move_to_end(chunk)
        while len(self._announced) > self._limit:
            self._announced.popitem(last=False)

    def _hint(self, window: int, end: int) -> None:
        """Windows [window, end), shard by shard."""
        while window < end:
            (shard,), (token,) = locate(np.array([window]), self._first, self._seq_len)
            stop = min(end, int(self._first[shard + 1]))
            self._reader.will_need(int(shard), int(token), (stop - window) * self._seq_len + 1)
            window = stop
