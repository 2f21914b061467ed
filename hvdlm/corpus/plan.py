"""The plan: inputs cut into tasks. It follows from the inputs and the seed alone, never from workers.

A task is about 1/256 of the input, at least 1 MiB and at most 256 MiB. It is made of pieces: a
file, or, where records can be found without reading from the start, a part of one (byte
ranges of .jsonl and of text by line or paragraph, row groups of .parquet). Every cut lies
between two documents, so the plan does not show in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.config import UserError
from hvdlm.corpus.parquet import row_group_bytes
from hvdlm.corpus.sources import InputFile
from hvdlm.data.order import permute

TASKS = 256
MIN_TASK_BYTES = 1 << 20
MAX_TASK_BYTES = 256 << 20
MAX_DOCUMENT_BYTES = 200 << 20
"""A process holds the document that it encodes, a few times over, in less than 1 GiB."""
_SCAN_BYTES = 1 << 16
_RECORD_END = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n\r?\n")}


@dataclass(frozen=True, slots=True)
class Piece:
    """A file or a part of one: [start, end) in bytes (row groups for parquet), and its weight in bytes.

    `changed_ns` is when the file was last changed as the plan was made; 0 = not known.
    """

    path: str
    kind: str
    start: int
    end: int
    size_bytes: int
    changed_ns: int = 0


@dataclass(frozen=True)
class Task:
    """What one worker encodes at a time.

    Attributes:
        index: place in the plan.
        split: "train" or "val" for every document, or "" to split by the documents' hashes.
        pieces: what to read, in order.
    """

    index: int
    split: str
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        """Weight of the pieces."""
        return sum(piece.size_bytes for piece in self.pieces)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Task:
        """What `dataclasses.asdict` made of a task."""
        return Task(value["index"], value["split"], tuple(Piece(**piece) for piece in value["pieces"]))


def make_plan(
    files: Sequence[InputFile], val_files: Sequence[InputFile], *, document: str, field: str, seed: int
) -> list[Task]:
    """Cut the inputs into tasks; pieces are shuffled, so a task is a sample of the whole input.

    Args:
        files: the inputs, sorted.
        val_files: inputs for validation alone; empty = `files` are split by hash.
        document: "file", "paragraph" or "line".
        field: the column of parquet files.
        seed: of the shuffle.

    Returns:
        The tasks, those of `files` first.

    Raises:
        UserError: a parquet file that is damaged or lacks the column, a file too long for one document.
    """
    tasks: list[Task] = []
    groups = [(files, "train" if val_files else ""), (val_files, "val")]
    for group, split in groups:
        total_bytes = sum(file.size_bytes for file in group)
        task_bytes = min(max(total_bytes // TASKS, MIN_TASK_BYTES), MAX_TASK_BYTES)
        pieces = [piece for file in group for piece in _cut(file, task_bytes, document, field)]
        for pieces_of_task in _fill(_shuffled(pieces, seed), task_bytes):
            tasks.append(Task(len(tasks), split, tuple(pieces_of_task)))
    return tasks


def _shuffled(pieces: list[Piece], seed: int) -> list[Piece]:
    n = len(pieces)
    if n == 0:
        return pieces
    return [pieces[i] for i in permute(np.arange(n), n, seed=seed, epochs=np.zeros(n, np.int64))]


def _fill(pieces: list[Piece], task_bytes: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    group_bytes = 0
    for piece in pieces:
        if group and group_bytes + piece.size_bytes > task_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(piece)
        group_bytes += piece.size_bytes
    if group:
        yield group


def _cut(file: InputFile, task_bytes: int, document: str, field: str) -> Iterator[Piece]:
    if file.kind == "parquet":
        yield from _cut_row_groups(file, task_bytes, field)
        return
    separator = _RECORD_END.get("line" if file.kind == "jsonl" else document)
    starts = [0]
    if file.kind == "text" and document == "file" and file.size_bytes > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{file.path}: one document of {file.size_bytes} bytes, at most {MAX_DOCUMENT_BYTES} can be; "
            "cut it with --document paragraph or line"
        )
    if file.kind in ("jsonl", "text") and separator:
        starts = _record_starts(file, task_bytes, separator)
    for start, end in zip(starts, [*starts[1:], file.size_bytes], strict=True):
        yield Piece(file.path, file.kind, start, end, end - start, file.changed_ns)


def _record_starts(file: InputFile, task_bytes: int, separator: re.Pattern[bytes]) -> list[int]:
    """Byte offsets about `task_bytes` apart where a record begins."""
    starts = [0]
    try:
        with Path(file.path).open("rb") as stream:
            while (wanted := starts[-1] + task_bytes) < file.size_bytes:
                stream.seek(wanted)
                position = wanted
                # A separator that straddles two reads is missed; the next one does as well.
                while chunk := stream.read(_SCAN_BYTES):
                    if match := separator.search(chunk):
                        position += match.end()
                        break
                    position += len(chunk)
                if position >= file.size_bytes:
                    break
                starts.append(position)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}; check the file") from None
    return starts


def _cut_row_groups(file: InputFile, task_bytes: int, field: str) -> Iterator[Piece]:
    sizes = row_group_bytes(file.path, field)
    start, weight = 0, 0
    for index, size_bytes in enumerate(sizes):
        weight += size_bytes
        if weight >= task_bytes or index + 1 == len(sizes):
            yield Piece(file.path, file.kind, start, index + 1, weight, file.changed_ns)
            start, weight = index + 1, 0
