import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdlm.corpus import plan
from hvdlm.corpus.plan import Task, make_plan
from hvdlm.corpus.readers import ReadOptions, read_documents
from hvdlm.corpus.sources import find_inputs


def tasks_of(folder: Path, document: str = "file", seed: int = 0) -> list[Task]:
    return make_plan(find_inputs([str(folder)]), [], document=document, field="text", seed=seed)


def texts(tasks: list[Task], document: str) -> list[str]:
    read = ReadOptions(document=document)
    pieces = sorted((p for task in tasks for p in task.pieces), key=lambda piece: (piece.path, piece.start))
    documents = (d for piece in pieces for d in read_documents(piece, read, Path(piece.path).parent))
    return [(document.text or b"").decode() for document in documents]


@pytest.mark.parametrize("task_bytes", [1, 2, 3, 5, 16, 50, 1000])
@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_cuts_lie_between_documents(
    task_bytes: int, document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(task_bytes)
    text = "".join(source.choices(["a", "中", "\n", "\r\n", " ", "\n\n", "\r\n\r\n", "\n \n"], k=300))
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows = "".join(json.dumps({"text": f"{i}" * source.randrange(9)}) + "\n" for i in range(40))
    (tmp_path / "b.jsonl").write_text(rows)
    table = pa.table({"text": [f"row {i}" for i in range(20)]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    whole = texts(tasks_of(tmp_path, document), document)
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", task_bytes)
    monkeypatch.setattr(plan, "_SCAN_BYTES", 5)
    cut = tasks_of(tmp_path, document)
    assert texts(cut, document) == whole
    assert task_bytes == 1000 or len(cut) > 3
    assert [task.index for task in cut] == list(range(len(cut)))


def test_small_files_share_a_task_and_the_seed_mixes_them(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02d}.txt").write_bytes(b"x" * 100_000)
    tasks = tasks_of(tmp_path)
    assert len(tasks) == 5
    assert all(task.size_bytes <= plan.MIN_TASK_BYTES for task in tasks)
    paths = [piece.path for task in tasks for piece in task.pieces]
    assert paths != sorted(paths)
    assert len({*paths}) == 50
    assert tasks_of(tmp_path) == tasks
    assert tasks_of(tmp_path, seed=1) != tasks


def test_validation_inputs_come_last_and_are_marked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("val")
    files = find_inputs([str(tmp_path)])
    tasks = make_plan(files[:1], files[1:], document="file", field="text", seed=0)
    assert [(task.split, Path(task.pieces[0].path).name) for task in tasks] == [
        ("train", "a.txt"),
        ("val", "b.txt"),
    ]
    assert [task.split for task in make_plan(files, [], document="file", field="text", seed=0)] == [""]
