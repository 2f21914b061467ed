"""Several processes on one data set: late ones, slow ones, and ones that slept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hvdlm.corpus import build as builds
from hvdlm.corpus import existing, plan, signs
from hvdlm.corpus import work as works
from hvdlm.corpus.build import Built, build
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.options import Options
from hvdlm.corpus.readers import ReadOptions
from hvdlm.data.verify_all import verify_folder


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Some tasks of text."""
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 1000)
    (tmp_path / "a.txt").write_text("\n".join(f"document number {i}" for i in range(400)))
    return Options(tmp_path / "out", (str(tmp_path / "a.txt"),), "byte", read=ReadOptions(document="line"))


def element(options: Options, index: int, *, job: int = 1, force: bool = False) -> Built:
    """What an element of a job array of two makes."""
    crew = Crew(f"array-{job}", index, 2, apart=True)
    return build(options, workers=1, crew=crew, force=force)


def test_a_process_that_slept_finds_the_data_set_complete(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, others = builds.encode_task, list[Built]()

    def sleep_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(builds, "encode_task", encode)
        monkeypatch.setattr(works, "LEASE_S", -1.0)
        others.append(element(options, 1))
        return encode(*args)

    monkeypatch.setattr(builds, "encode_task", sleep_meanwhile)
    assert element(options, 0).manifest == others[0].manifest
    assert verify_folder(options.out) == []
    assert not [*options.out.glob(".tmp-*")]


@pytest.mark.parametrize("stage", ["look_up", "install"])
def test_a_process_lives_to_others_in_every_stage(
    stage: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "_EVERY_S", 0.02)
    act, given = getattr(builds, stage), list[int]()
    starts = options.out / existing.WORK_NAME / "starts"

    def act_slowly(*args: Any, **more: Any) -> Any:
        for _ in range(2):
            given.append(signs.sign_of_life(starts, "array-1", 0).stat().st_mtime_ns)
            time.sleep(0.2)
        return act(*args, **more)

    monkeypatch.setattr(builds, stage, act_slowly)
    element(options, 0)
    assert given[0] < given[1]


def test_force_replaces_once_however_many_come_late(options: Options) -> None:
    assert element(options, 0).made
    assert not element(options, 1).made
    assert element(options, 0, job=2, force=True).made
    assert not element(options, 1, job=2, force=True).made
    assert element(options, 1, job=3, force=True).made
