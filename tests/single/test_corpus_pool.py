from pathlib import Path

import pytest

from hvdlm.config import UserError
from hvdlm.corpus.encode import Job
from hvdlm.corpus.plan import Piece, Task
from hvdlm.corpus.pool import run_tasks
from hvdlm.corpus.readers import ReadOptions
from hvdlm.data.entries import TokenizerInfo
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import from_library


@pytest.fixture
def job(tmp_path: Path) -> Job:
    tokenizer = from_library(TOKENIZERS["byte"]([], 0))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.json_bytes)
    info = TokenizerInfo("tokenizer.json", tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
    return Job(tmp_path, info, "", ReadOptions(), 0.5, 1000, 0)


def tasks(folder: Path, *kinds: str) -> list[Task]:
    (folder / "a.txt").write_text("some text")
    piece = {kind: Piece(str(folder / "a.txt"), kind, 0, 9, 9) for kind in kinds}
    return [Task(i, "train", (piece[kind],)) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_plan(workers: int, job: Job) -> None:
    read: list[int] = []
    results = run_tasks(tasks(job.folder, *["text"] * 5), job, workers=workers, report=read.append)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    assert sum(read) == 45
    assert [result.counts.train for result in results] == [1] * 5
    assert [entry.tokens for result in results for entry in result.train] == [10] * 5


def test_a_user_error_of_a_worker_arrives_whole(job: Job) -> None:
    with pytest.raises(UserError, match=r"a\.txt: line 1: not JSON") as caught:
        run_tasks(tasks(job.folder, "text", "jsonl"), job, workers=2, report=print)
    assert caught.value.exit_code == 2


def test_a_fault_of_a_worker_brings_its_traceback(job: Job) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed.*KeyError: 'no such kind'"):
        run_tasks(tasks(job.folder, "text", "no such kind"), job, workers=2, report=print)
