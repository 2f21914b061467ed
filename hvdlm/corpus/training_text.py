"""The text that a tokenizer is trained on: documents for training only, a bounded amount of them."""

from __future__ import annotations

from collections.abc import Iterator

from hvdlm.corpus.dedup import unique_documents
from hvdlm.corpus.documents import Rejects, split_of
from hvdlm.corpus.job import Job, Report, Tally
from hvdlm.text.distinct import DISTINCT_BYTES, until_full
from hvdlm.text.fast import SAMPLE_CHARS
from hvdlm.text.pieces import cut_utf8

_SAMPLED_TASKS = 16
MAX_BYTES = 256 << 20
"""Text that a tokenizer is trained on at most; of a larger input, every task gives its first part."""


def training_texts(job: Job, tasks: int, *, total_bytes: int, report: Report) -> Iterator[str]:
    """Yield the texts of the training split in the order of the plan, cut, as many as a trainer can hold.

    Args:
        job: says how documents are read and kept; what goes to validation is left out.
        tasks: how many the plan has.
        total_bytes: their weight.
        report: called with newly read bytes.

    Raises:
        UserError: bad input.
    """
    yield from until_full(_pieces(job, tasks, share_bytes(tasks, total_bytes), report), DISTINCT_BYTES)


def _pieces(job: Job, tasks: int, share: int, report: Report) -> Iterator[str]:
    for index in range(tasks):
        task, left, told = job.task(index), share, 0
        if task.split == "val":
            continue
        for text, done_bytes in unique_documents(task, job, Rejects(job.keep.max_errors)):
            report(Tally(done_bytes - told))
            told = done_bytes
            if split_of(task, text, job.val_fraction) == "train":
                for piece in cut_utf8(text):
                    left -= len(piece.encode())
                    yield piece
            del text
            if left <= 0:
                break


def share_bytes(tasks: int, total_bytes: int) -> int:
    """Bytes of text that each task gives at most: no limit where all the inputs are small together."""
    return MAX_BYTES if total_bytes <= MAX_BYTES else max(MAX_BYTES // tasks, 1)


def sample_texts(job: Job, tasks: int) -> list[str]:
    """Documents from all over the input, `SAMPLE_CHARS` of them or so, to compare encoders on.

    Raises:
        UserError: bad input.
    """
    chosen = range(0, tasks, -(-tasks // _SAMPLED_TASKS))
    share, texts = SAMPLE_CHARS // len(chosen), list[str]()
    for index in chosen:
        left = share
        for text, _ in unique_documents(job.task(index), job, Rejects(job.keep.max_errors)):
            texts.append(next(cut_utf8(text))[:left])
            left -= len(texts[-1])
            del text
            if left <= 0:
                break
    return texts
