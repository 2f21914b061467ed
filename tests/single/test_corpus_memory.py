"""How much of the input is in memory at a time, by tracemalloc; whole commands are in test_preprocess.py."""

import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdlm.corpus import dedup, encode, lines, training_text
from hvdlm.corpus.documents import Rejects, kept_documents
from hvdlm.corpus.job import Job, Keep
from hvdlm.corpus.plan import Piece, Task
from hvdlm.corpus.readers import ReadOptions

MIB = 1 << 20


def peak_mib(work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def encoded(job: Job) -> None:
    deque(encode._batches(job.task(0), job, Rejects(0)), 0)


def trained_on(job: Job) -> None:
    deque(training_text._pieces(job, 1, 1 << 40, lambda tally: None), 0)


def hashed(job: Job) -> None:
    dedup.hash_task(0, job, lambda tally: None)


@pytest.mark.parametrize("use", [encoded, trained_on, hashed])
@pytest.mark.parametrize(("kind", "document"), [("jsonl", "file"), ("text", "line")])
def test_a_document_is_gone_before_the_next_is_read(
    kind: str, document: str, use: Callable[[Job], None], tmp_path: Path
) -> None:
    path, text = tmp_path / "a", b"some words " * (16 * MIB // 11)
    path.write_bytes((b'{"text":"' + text + b'"}\n' if kind == "jsonl" else text + b"\n") * 4)
    size = path.stat().st_size
    job = Job(tmp_path, read=ReadOptions(document=document), keep=Keep())
    job.write_plan([Task(0, "train", (Piece(str(path), kind, 0, size, size),))])
    # A line twice while it becomes a text, of another size at first, and some megabytes of pieces.
    assert 32 < peak_mib(lambda: use(job)) < 46


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_a_part_of_a_text_is_there_once(document: str, tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl", b"some words " * (16 * MIB // 11)
    path.write_bytes((b'{"text":"short\\n\\n' + text + b'\\n"}\n') * 2)
    size = path.stat().st_size
    job = Job(tmp_path, read=ReadOptions(document=document), keep=Keep())
    task = Task(0, "train", (Piece(str(path), "jsonl", 0, size, size),))
    held = []
    tracemalloc.start()
    for document_of_it in kept_documents(task, job, Rejects(0)):
        held.append(tracemalloc.get_traced_memory()[0] / MIB)
        del document_of_it
    tracemalloc.stop()
    assert len(held) == 4
    assert 32 < max(held) < 40  # The whole text and the part.


def test_a_paragraph_of_a_million_lines_is_no_list() -> None:
    text = b"a\n" * MIB + b"\n"
    paragraphs = lines.parts_of_text(text, "paragraph", Piece("", "jsonl", 0, 1, 1))
    assert peak_mib(lambda: next(paragraphs)) < 8
