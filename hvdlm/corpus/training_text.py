"""The text that a tokenizer is trained on: documents for training only, a bounded amount of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hvdlm.corpus.encode import split_of
from hvdlm.corpus.plan import Task
from hvdlm.corpus.readers import ReadOptions, read_documents

MAX_BYTES = 256 << 20
"""Text that a tokenizer is trained on at most; of a larger input, every task gives its first part."""


def training_texts(
    tasks: Sequence[Task], read: ReadOptions, *, val_fraction: float, report: Callable[[int], None]
) -> Iterator[str]:
    """Yield the texts of the training split, in the order of the plan.

    Args:
        tasks: the plan.
        read: how documents are read.
        val_fraction: as for encoding; what goes to validation is left out.
        report: called with newly read bytes.

    Raises:
        UserError: bad input.
    """
    share = share_bytes(tasks)
    for task in tasks:
        left = share
        for piece in task.pieces if task.split != "val" else ():
            told = 0
            for text, done_bytes in read_documents(piece, read):
                report(done_bytes - told)
                told = done_bytes
                raw = (text or "").encode()
                if text and split_of(task, raw, val_fraction) == "train":
                    left -= len(raw)
                    yield text
                if left <= 0:
                    break
            if left <= 0:
                break


def share_bytes(tasks: Sequence[Task]) -> int:
    """Bytes of text that each task gives at most: no limit where all the inputs are small together."""
    total_bytes = sum(task.size_bytes for task in tasks)
    return MAX_BYTES if total_bytes <= MAX_BYTES else max(MAX_BYTES // len(tasks), 1)
