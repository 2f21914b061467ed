"""Duplicates, filters and rejects."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm.config import UserError, run_command
from hvdlm.corpus import dedup, existing, plan
from hvdlm.corpus.documents import Rejects, kept_documents
from hvdlm.corpus.job import Job, Keep, Tally
from hvdlm.corpus.plan import make_plan
from hvdlm.corpus.sources import find_inputs
from hvdlm.preprocess.__main__ import main


def run(*args: str | Path | int) -> int:
    return run_command("preprocess", lambda: main([str(arg) for arg in args]))


def rows(texts: list[Any]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A plan of several tasks over texts of which half are there twice or more."""
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 2000)
    choose = random.Random(0)
    texts = [f"document {choose.randrange(300)} " + "x" * choose.randrange(3) for _ in range(1000)]
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text(rows(texts[250 * i : 250 * i + 250]))
    work = tmp_path / "work"
    work.mkdir()
    job = Job(work, keep=Keep(dedup=True))
    job.write_plan(make_plan(find_inputs([str(tmp_path)]), [], document="file", field="text", seed=0))
    return job


def tasks_of(job: Job) -> int:
    return len((job.folder / "plan.jsonl").read_text().splitlines())


def texts_of(job: Job, index: int) -> list[bytes]:
    return [text for text, _ in kept_documents(job.task(index), job, Rejects(0))]


@pytest.mark.parametrize(("ranges", "run_documents"), [(1, 1 << 22), (2, 7), (7, 7), (1, 1)])
def test_of_equal_documents_the_first_in_plan_order_is_kept(
    ranges: int, run_documents: int, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "RUN_DOCUMENTS", run_documents)
    tasks, heard = tasks_of(job), list[Tally]()
    assert tasks > 8
    runs = [dedup.hash_task(index, job, heard.append)["runs"] for index in reversed(range(tasks))][::-1]
    assert sum(tally.documents for tally in heard) == 1000
    assert sum(tally.read_bytes for tally in heard) == sum(job.task(i).size_bytes for i in range(tasks))
    found = [
        dedup.find_drops(index, job, heard.append, ranges=ranges, runs=runs)["duplicates"]
        for index in range(ranges)
    ]
    found += [path.stat().st_size // 4 for path in job.folder.glob("copies-*.bin")]
    seen: set[bytes] = set()
    for index in range(tasks):
        texts, flags = texts_of(job, index), dedup.duplicate_flags(index, job)
        dropped = [number for number, flag in zip(range(len(texts)), flags, strict=False) if flag]
        expected = []
        for number, text in enumerate(texts):
            if text in seen:
                expected.append(number)
            seen.add(text)
        assert dropped == expected
        assert len(dropped) < len(texts) or index > 0
    assert sum(found) == 1000 - len(seen)
    assert all(found[:ranges])


def test_however_often_a_text_occurs_a_run_has_it_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(["the same"] * 500 + ["another"]))
    work = tmp_path / "work"
    work.mkdir()
    job = Job(work, keep=Keep(dedup=True))
    plan_of_one = make_plan(find_inputs([str(tmp_path)]), [], document="file", field="text", seed=0)
    job.write_plan(plan_of_one)
    dedup.hash_task(0, job, lambda tally: None)
    assert (work / "hashes-00000-0.bin").stat().st_size == 2 * dedup._HASH.itemsize
    assert [*islice(dedup.duplicate_flags(0, job), 600)] == [0] + [1] * 499 + [0] * 100


def test_without_dedup_nothing_is_dropped(job: Job) -> None:
    assert not any(islice(dedup.duplicate_flags(0, Job(job.folder)), 1000))


def test_ranges_bound_what_is_sorted_at_a_time() -> None:
    assert dedup.count_ranges(0) == 1
    assert dedup.count_ranges(dedup.RANGE_DOCUMENTS) == 1
    assert dedup.count_ranges(dedup.RANGE_DOCUMENTS + 1) == 2


def test_ranges_meet_at_their_bounds(tmp_path: Path) -> None:
    table = np.zeros(6, dedup._HASH)
    table["high"] = [0, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 2, (1 << 64) - 1]
    table.tofile(tmp_path / "t")
    for ranges in (1, 2, 3, 5):
        parts = [dedup._range_of(tmp_path / "t", i, ranges) for i in range(ranges)]
        assert np.concatenate(parts).tolist() == table.tolist()
    assert dedup._range_of(tmp_path / "t", 0, 2)["high"].tolist() == [0, (1 << 63) - 1]


def test_what_is_left_out_is_counted_and_rejects_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [f"document number {i}" for i in range(40)]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    bad = '{"text": 7}\nno json\n{"text": "b\xff"}\n'.encode("latin1")
    source.write_bytes(rows([*good, "", "short", "long" * 50, good[3], good[3]]).encode() + bad)
    arguments = [source, "--out", out, "--tokenizer", "byte", "--workers", 1, "--val-fraction", 0.3]
    arguments += ["--dedup", "exact", "--min-chars", 6, "--max-chars", 100]
    assert run(*arguments) == 2
    assert "line 46: field 'text' is a number, needed a string" in capsys.readouterr().err
    assert run(*arguments, "--max-errors", 2) == 2
    assert "line 48: not UTF-8 text" in (error := capsys.readouterr().err)
    assert "(one more than --max-errors 2)" in error
    assert run(*arguments, "--max-errors", 3) == 0
    said = capsys.readouterr().out
    assert "(left out: 1 empty, 1 too short, 1 too long, 3 bad, 2 duplicate)" in said
    stats = json.loads((out / "stats.json").read_text())
    assert sum(split["documents"] for split in stats["splits"].values()) == 40
    assert sum(sum(split["lengths"]) for split in stats["splits"].values()) == 40
    assert stats["splits"]["train"]["lengths"][4] == stats["splits"]["train"]["documents"]
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(row["place"], row["reason"]) for row in listed] == [
        ("line 42", "too_short"),
        ("line 43", "too_long"),
        ("line 46", "bad"),
        ("line 47", "bad"),
        ("line 48", "bad"),
    ]
    assert {row["file"] for row in listed} == {str(source)}


def test_places_in_a_part_of_a_file_are_told_without_reading_what_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 300)
    monkeypatch.setattr("hvdlm.corpus.readers.number_in_file", None)
    texts = [f"document {i}" if i % 3 else "short" for i in range(60)]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text(rows(texts))
    arguments = [source, "--out", out, "--tokenizer", "byte", "--workers", 1, "--val-fraction", 0.3]
    assert run(*arguments, "--min-chars", 6) == 0
    found = []
    for line in (out / "rejects.jsonl").read_text().splitlines():
        _, number, *after = json.loads(line)["place"].split(" ")
        start = int(after[-1]) if after else 0
        found.append(source.read_bytes()[:start].count(b"\n") + int(number))
    assert sorted(found) == [i + 1 for i in range(60) if i % 3 == 0]


def test_bad_records_are_counted_over_all_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 200)
    (tmp_path / "a.jsonl").write_text((rows([f"document {i}" for i in range(20)]) + "bad\n") * 3)
    arguments = [tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", 1]
    assert run(*arguments, "--max-errors", 2) == 2
    assert "3 bad records, allowed are --max-errors 2" in capsys.readouterr().err
    listed = [*(tmp_path / "out" / existing.WORK_NAME).glob("rejects-*.jsonl")]
    assert sum(len(path.read_text().splitlines()) for path in listed) == 3
    # What was done is not done again.
    monkeypatch.setattr("hvdlm.corpus.build.encode_task", None)
    assert run(*arguments, "--max-errors", 3) == 0


def test_an_input_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """The plan knows when each file was last changed."""
    source = tmp_path / "a.txt"
    source.write_text("some text")
    work = tmp_path / "work"
    work.mkdir()
    job = Job(work)
    job.write_plan(make_plan(find_inputs([str(source)]), [], document="file", field="text", seed=0))
    source.write_text("other text")
    with pytest.raises(UserError, match=r"a\.txt: was changed while it was read"):
        list(kept_documents(job.task(0), job, Rejects(0)))
