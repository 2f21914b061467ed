"""This data coordinate's batches, read ahead by threads. The state is one integer: completed steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch

from hvdlm.config import UserError
from hvdlm.data.blend import ALONE, Blend, windows_of_samples
from hvdlm.data.files import check_file
from hvdlm.data.locality import Chunks, chunks_within
from hvdlm.data.order import first_windows, locate, permute, share_of, slot_seed, step_samples
from hvdlm.data.prefetch import Prefetcher
from hvdlm.data.readahead import ReadAhead
from hvdlm.data.sources import Source, no_window, shards_of, tokens_of, window_counts
from hvdlm.data.windows import Recycler, WindowReader

MAX_OPEN_FILES = 256
"""Descriptors of one loader, over all its threads: a quarter of the usual limit of 1024."""
_MAX_THREADS = 2  # The second carries on while one waits for a slow read; more only contend for the GIL.
_BLOCK_SAMPLES = 1 << 14  # Samples located at a time.
_EVALUATION_SEED = 0x6576616C  # One order for all runs, whatever their seed.

Place: TypeAlias = tuple[int, list[list[int]], list[list[int]]]
"""A step; and of each window of each slot of this share, the shard and the byte offset in its file."""


@dataclass(frozen=True)
class BatchPlan:
    """What a step consists of: samples of `seq_len` tokens, `global_batch` of them in micro-slots of
    `micro_batch`, in the order of `seed`, shuffled within `shuffle_mb` MiB (0 = over everything); with
    `document_mask` batches also have "positions"."""

    seq_len: int
    global_batch: int
    micro_batch: int
    seed: int
    shuffle_mb: int = 0
    document_mask: bool = False

    @property
    def slots(self) -> int:
        """Micro-slots a step, over all ranks."""
        return self.global_batch // self.micro_batch


# Neither is frozen: that would cost the loader a fiftieth of its speed.
@dataclass(eq=False, slots=True)
class Slot:
    """One forward and backward pass: its index in the step, the seed of its random numbers, and
    "tokens" and "labels" int64 [micro_batch, seq_len], which are views of one buffer; with a document
    mask also "positions", int64 [micro_batch, seq_len], of each token in its document."""

    index: int
    rng_seed: int
    batch: dict[str, torch.Tensor]


@dataclass(eq=False, slots=True)
class StepBatch:
    """This share of one step, counted from 1, which takes the samples [first_sample, end_sample).
    `label_count` is the number of labels in the whole global batch: all of them, also with a document
    mask, under which a document's eos predicts the next one's first token from its own document alone."""

    step: int
    first_sample: int
    end_sample: int
    label_count: int
    slots: list[Slot]


@final
class Loader:
    """Batches of one split for data coordinate d of D.

    Args:
        sources: The data sets, of one tokenizer.
        split: "train" or "val".
        blend: How samples are drawn from the sources; samples before its first are none of this loader's.
        plan: Equal on all ranks.
        share: (d, D), from the mesh; the ranks of one d read the same.
        prefetch_steps: Steps kept ready by threads; 0 = no thread, a step is read when it is asked for.
        check_sizes: See at the start that every shard is there; off where the folders have only those
            that will be read.

    Raises:
        UserError: A source's split has no sample, the batches do not divide, or one of this share's shards
            is missing or of another size (each shard is checked by one d at the start, and by
            everybody who opens it).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        *,
        blend: Blend = ALONE,
        plan: BatchPlan,
        share: tuple[int, int],
        prefetch_steps: int,
        check_sizes: bool = True,
    ) -> None:
        if plan.global_batch % plan.micro_batch:
            raise UserError(
                f"train.global_batch is {plan.global_batch}, needs a multiple of train.micro_batch "
                f"({plan.micro_batch}); change one of them"
            )
        self._sources, self._split, self._blend, self._plan = sources, split, blend, plan
        self._slots = share_of(plan.slots, share)
        self._counts = window_counts(sources, split, plan.seq_len)
        self._first = first_windows(tokens_of(sources, split), plan.seq_len)
        self._token_bytes = np.dtype(sources[0].manifest.tokenizer.token_dtype).itemsize
        extents = (entry.extents for _, entry in shards_of(sources, split))
        self._offsets = np.array([extent.tokens.offset for extent in extents], dtype=np.int64)
        self._chunks = chunks_of(sources, plan)
        self._prefetch_steps = prefetch_steps
        self._prefetcher: Prefetcher[StepBatch] | None = None
        for folder, entry in shards_of(sources, split)[share[0] :: share[1]] if check_sizes else ():
            check_file(folder, entry.name, entry.file_bytes)

    @property
    def windows(self) -> list[int]:
        """Samples an epoch of each source."""
        return self._counts

    def steps(self, start_step: int) -> Iterator[StepBatch]:
        """The steps after `start_step` completed ones, for ever; ends an earlier iteration.

        Raises:
            UserError: From the iterator: a file is missing, changed, broken or holds a bad id.
        """
        self.close()
        if not self._slots:
            return (self._batch(step, []) for step in _count(start_step + 1, 1))
        if not self._prefetch_steps:
            return self._read_steps(start_step + 1, 1)
        threads = min(_MAX_THREADS, self._prefetch_steps)
        self._prefetcher = Prefetcher(
            lambda k: self._read_steps(start_step + 1 + k, threads),
            threads=threads,
            depth=self._prefetch_steps,
        )
        return self._prefetcher

    def close(self) -> None:
        """Stop the threads and close their files. The loader can be used again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _read_steps(self, first_step: int, stride: int) -> Iterator[StepBatch]:
        """One thread's steps: every `stride`-th from `first_step`."""
        plan = self._plan
        reader = WindowReader(
            self._sources,
            self._split,
            seq_len=plan.seq_len,
            max_open=MAX_OPEN_FILES // stride,
            with_positions=plan.document_mask,
        )
        shape = (len(self._slots), plan.micro_batch, plan.seq_len + 1)
        recycler = Recycler(shape, limit=self._prefetch_steps + 2)
        ahead = self._chunks and ReadAhead(
            reader, self._counts, self._first, chunks=self._chunks, seq_len=plan.seq_len
        )
        try:
            for step, shards, places in self._places(first_step, stride):
                if ahead:
                    ahead.announce(shards, places)
                # No name here may hold on to a batch: its memory would not be handed out again.
                yield self._batch(step, self._read_slots(step, reader, shards, places, recycler.take()))
        finally:
            reader.close()

    def _read_slots(
        self,
        step: int,
        reader: WindowReader,
        shards: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        memory: np.ndarray,
    ) -> list[Slot]:
        seed = self._plan.seed
        # Iterating over `memory` would cost 5 to 10 % of a batch: it ends with an IndexError inside numpy.
        return [
            Slot(index, slot_seed(seed, step, index), reader.read_at(shards[k], places[k], memory[k]))
            for k, index in enumerate(self._slots)
        ]

    def _places(self, first_step: int, stride: int) -> Iterator[Place]:
        plan = self._plan
        share = np.arange(self._slots.start * plan.micro_batch, self._slots.stop * plan.micro_batch)
        steps_a_block = max(1, _BLOCK_SAMPLES // len(share))
        for block_step in _count(first_step, stride * steps_a_block):
            steps = block_step + stride * np.arange(steps_a_block)
            samples = ((steps - 1)[:, None] * plan.global_batch + share).reshape(-1)
            windows = windows_of_samples(
                samples, self._counts, seed=plan.seed, blend=self._blend, chunks=self._chunks
            )
            shape = (steps_a_block, len(self._slots), plan.micro_batch)
            shards, firsts = locate(windows, self._first, plan.seq_len)
            places = self._offsets[shards] + firsts * self._token_bytes
            each = zip(steps.tolist(), shards.reshape(shape), places.reshape(shape), strict=True)
            yield from ((step, of_shards.tolist(), of_places.tolist()) for step, of_shards, of_places in each)

    def _batch(self, step: int, slots: list[Slot]) -> StepBatch:
        first, end = step_samples(step, self._plan.global_batch)
        return StepBatch(step, first, end, self._plan.global_batch * self._plan.seq_len, slots)


def chunks_of(sources: Sequence[Source], plan: BatchPlan) -> Chunks | None:
    """The chunks that samples are shuffled within; None = over everything."""
    token_bytes = np.dtype(sources[0].manifest.tokenizer.token_dtype).itemsize
    return chunks_within(plan.shuffle_mb, plan.seq_len * token_bytes)


def evaluation_batches(
    sources: Sequence[Source],
    split: str,
    *,
    plan: BatchPlan,
    share: tuple[int, int],
    limit_batches: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Each sample of a fixed set once, on exactly one data coordinate, in batches that depend on no rank.

    Args:
        sources: The data sets, of one tokenizer, whose windows are numbered one after the other.
        split: "train" or "val".
        plan: Its micro-batches, dealt out whole; the last of the set may have fewer samples. Its seed has
            no part.
        share: (d, D).
        limit_batches: So many global batches of a fixed permutation (all, where there are fewer); 0 = the
            whole split in its own order, tails included: every token but each shard's first is
            predicted once.

    Yields:
        "tokens" and "labels" int64 [m, T]; labels are -100 after the end of a shard. With a document mask
        also "positions" int64 [m, T]; every label counts as without one.

    Raises:
        UserError: At the first step: the split has no sample; later: as `WindowReader.read`.
    """
    seq_len, limit_samples = plan.seq_len, limit_batches * plan.global_batch
    tokens = tokens_of(sources, split)
    # One token less than a full window past each end gives the short last window a number too.
    first = first_windows(tokens if limit_samples else tokens + (seq_len - 1) * (tokens > 0), seq_len)
    n = int(first[-1])
    if not n:
        raise UserError(no_window(sources, split, seq_len if limit_samples else 1))
    samples = min(n, limit_samples) if limit_samples else n
    reader = WindowReader(
        sources, split, seq_len=seq_len, max_open=MAX_OPEN_FILES, with_positions=plan.document_mask
    )
    try:
        for batch in share_of(-(-samples // plan.micro_batch), share):
            first_sample = batch * plan.micro_batch
            windows = np.arange(first_sample, min(first_sample + plan.micro_batch, samples))
            if limit_samples:
                windows = permute(windows, n, seed=_EVALUATION_SEED, epochs=np.zeros(1, np.int64))
            shards, firsts = locate(windows, first, seq_len)
            yield reader.read(shards.tolist(), firsts.tolist())
    finally:
        reader.close()


def _count(start: int, stride: int) -> Iterator[int]:
    while True:
        yield start
        start += stride
