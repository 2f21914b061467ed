"""What is seen of many processes' work while it goes on."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from hvdlm.corpus import progress as shown
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.job import Tally
from hvdlm.corpus.progress import Progress
from hvdlm.corpus.signs import sign_of_life
from hvdlm.corpus.work import Work

NOTHING = Tally()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Of two processes, of which the other has told what it did."""
    monkeypatch.setattr(shown, "_BAR_EVERY_S", 0.02)
    work = Work(tmp_path, Crew("both", 0, 2), lambda: False)
    told = {"encode": list(Tally(3_000_000, 30, 4_000, 1, 2))}
    sign_of_life(tmp_path / "starts", "both", 1).write_text(json.dumps(told))
    return work


def show(work: Work, before: Tally = NOTHING) -> None:
    """A stage of which this process does a tenth."""
    with Progress(work, shows=True) as progress:
        progress.stage("encode", count=20, total_bytes=10_000_000, before=before)
        progress(Tally(1_000_000, 10, 2_000, 0, 1))
        work.signs.give()
        time.sleep(0.3)


def test_a_batch_log_gets_lines_with_what_all_did(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "_LINE_EVERY_S", 0.1)
    show(work)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "encode: 10.0 MB in 20 tasks"
    assert lines
    assert lines[0].startswith("encode: 4.0 of 10.0 MB, ")
    for words in (" MB/s, 3 of 20 tasks, 40 documents, ", " tokens/s, 1 rejected, ", " s left"):
        assert words in lines[0]


def test_what_an_earlier_start_did_is_done_and_no_speed_of_this_one(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "_LINE_EVERY_S", 0.1)
    show(work, Tally(5_000_000, tasks=10))
    first, line, *_ = capsys.readouterr().err.splitlines()
    assert first == "encode: 10.0 MB in 20 tasks, 10 of them were done before"
    assert line.startswith("encode: 9.0 of 10.0 MB, ")
    assert " 13 of 20 tasks, 40 documents, " in line


def test_a_terminal_gets_a_bar_that_begins_where_the_earlier_start_ended(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, bars = Terminal(), list[shown.tqdm]()
    monkeypatch.setattr(sys, "stderr", terminal)
    make = shown.tqdm

    def noted(**options: object) -> shown.tqdm:
        bars.append(make(file=terminal, **options))
        return bars[-1]

    monkeypatch.setattr(shown, "tqdm", noted)
    show(work, Tally(5_000_000, tasks=10))
    (bar,) = bars
    assert bar.initial == 5_000_000
    assert bar.n == 9_000_000
    assert "9.00M/10.0M" in terminal.getvalue()
    assert "13 of 20 tasks, 40 documents" in terminal.getvalue()
