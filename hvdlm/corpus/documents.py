"""The documents of a task that are kept, in order; and what became of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import xxhash

from hvdlm.config import UserError
from hvdlm.corpus.job import Job
from hvdlm.corpus.plan import Piece, Task
from hvdlm.corpus.readers import Document, place_of, read_documents
from hvdlm.data.files import publishing
from hvdlm.text.utf8 import decoded

REASONS = ("empty", "not_utf8", "too_short", "too_long", "bad", "duplicate")
"""Why a document was left out, as it is counted."""


class Kept(NamedTuple):
    """A document that is kept: its text in UTF-8, and how many bytes of the task are read by then."""

    text: bytes
    done_bytes: int


@final
class Rejects:
    """What a task left out: counts by reason, and a line for each document that was rejected.

    A context manager: the lines appear as a file, where there are any, when it ends without an exception.

    Args:
        max_errors: bad records that are allowed.
        path: of the lines; None = they are only counted.
    """

    def __init__(self, max_errors: int, path: Path | None = None) -> None:
        self.counts = dict.fromkeys(REASONS, 0)
        self.rejected = 0
        self._max_errors, self._path = max_errors, path
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def count(self, reason: str) -> None:
        """Leave a document out without a line: empty ones and duplicates."""
        self.counts[reason] += 1

    def add(self, piece: Piece, document: Document, reason: str, *, detail: str = "") -> None:
        """Reject a document.

        Raises:
            UserError: one bad record more than allowed, or a full disk.
        """
        self.counts[reason] += 1
        self.rejected += 1
        if reason == "bad" and self.counts["bad"] > self._max_errors:
            place = place_of(piece, document, exact=True)
            where = f"{piece.path}: {place}: " if place else f"{piece.path}: "
            allowed = f" (one more than --max-errors {self._max_errors})" if self._max_errors else ""
            raise UserError(f"{where}{detail}{allowed}")
        if self._path:
            place = place_of(piece, document)
            row = {"file": piece.path, "place": place, "reason": reason, "detail": detail}
            self._lines(self._path).write(json.dumps(row).encode() + b"\n")

    def _lines(self, path: Path) -> BinaryIO:
        if self._file is None:
            temp = self._stack.enter_context(publishing(path))
            self._file = self._stack.enter_context(temp.open("xb"))
        return self._file


def kept_documents(task: Task, job: Job, rejects: Rejects) -> Iterator[Kept]:
    """The documents of a task that are long and short enough, in the order of its pieces.

    Every stage that reads a task sees the same sequence, so a document is known by its place in it. Whoever
    loops over them drops one before it asks for the next: each may have 200 MB.

    Args:
        task: from the plan.
        job: says how to read, and what to keep.
        rejects: takes the others.

    Raises:
        UserError: a file that cannot be read, or more bad records than allowed.
    """
    keep, before = job.keep, 0
    counted = keep.min_chars > 0 or keep.max_chars > 0
    for piece in task.pieces:
        for document in read_documents(piece, job.read, job.folder):
            text = document.text
            chars = _chars(text) if text and counted else 0
            if document.problem:
                rejects.add(piece, document, "bad", detail=document.problem)
            elif text is None:
                rejects.add(piece, document, "not_utf8")
            elif not text:
                rejects.count("empty")
            elif chars < keep.min_chars:
                rejects.add(piece, document, "too_short", detail=f"{chars} characters")
            elif keep.max_chars and chars > keep.max_chars:
                rejects.add(piece, document, "too_long", detail=f"{chars} characters")
            else:
                yield Kept(text, before + document.done_bytes)
            del document, text  # Not both it and the next in memory.
        before += piece.size_bytes


def split_of(task: Task, text: bytes, val_fraction: float) -> str:
    """Where a document goes: by its own hash, so equal ones stay together whatever else is there.

    Args:
        task: may decide by itself.
        text: the document.
        val_fraction: 0..1.

    Returns:
        "train" or "val".
    """
    if task.split:
        return task.split
    return "val" if xxhash.xxh3_64_intdigest(text) < val_fraction * 2.0**64 else "train"


def _chars(text: bytes) -> int:
    return len(text) if text.isascii() else sum(map(len, decoded(text)))
