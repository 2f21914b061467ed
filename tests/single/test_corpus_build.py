"""Several processes on one data set: late ones, slow ones, and ones that slept."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdlm.config import UserError
from hvdlm.corpus import build as builds
from hvdlm.corpus import existing, plan, signs, stats, tokenizer_stage
from hvdlm.corpus import install as installs
from hvdlm.corpus import work as works
from hvdlm.corpus.build import Built, build
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.job import Keep
from hvdlm.corpus.options import Options
from hvdlm.corpus.readers import ReadOptions
from hvdlm.data.verify_all import verify_folder
from hvdlm.text import fast
from hvdlm.text.gigatoken_encoder import GigatokenEncoder


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


@pytest.mark.parametrize(("place", "late"), [("merge_val", False), ("merge_val", True), ("put_away", False)])
def test_a_process_that_slept_while_it_installed_leaves_the_data_set_alone(
    place: str, late: bool, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = existing if place == "put_away" else installs
    act = getattr(module, place)

    def sleep_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(module, place, act)
        made = act(*args) if place == "merge_val" else None
        monkeypatch.setattr(works, "LEASE_S", -1.0)
        assert element(options, 1).made
        if late:
            works.Work(options.out / existing.WORK_NAME, Crew("array-1", 2, 3, apart=True), lambda: False)
        return made if place == "merge_val" else act(*args)

    monkeypatch.setattr(module, place, sleep_meanwhile)
    assert element(options, 0).manifest
    assert verify_folder(options.out) == []
    assert (options.out / "tasks.json").exists()


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_force_that_is_killed_after_the_manifest_goes_on(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = builds.install

    def install_and_die(*args: Any, **more: Any) -> Any:
        install(*args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builds, "install", install_and_die)
        with pytest.raises(KeyboardInterrupt):
            build(options, workers=1, force=True)
    assert build(options, workers=1, force=True).made
    assert verify_folder(options.out) == []


def test_beginning_anew_that_is_killed_does_not_mix_two_data_sets(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deduplicated = replace(options, keep=Keep(dedup=True))
    (tmp_path / "a.txt").write_text("\n".join(f"document number {i % 300}" for i in range(900)))
    fresh = build(replace(deduplicated, out=tmp_path / "fresh"), workers=1)
    unlink = Path.unlink
    for count in range(12):
        out = tmp_path / f"out{count}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(builds, "encode_task", interrupt)
            build(replace(deduplicated, out=out), workers=1)
        left = count

        def unlink_some(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if path.parent.name == existing.WORK_NAME:
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink_some)
            build(replace(deduplicated, out=out, seed=5), workers=1, force=True)
        assert build(replace(deduplicated, out=out), workers=1).manifest == fresh.manifest


def test_reference_drops_what_the_fast_encoder_has_begun(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_stage, "FAST_FROM_BYTES", 0)
    bpe = replace(options, tokenizer="bpe", vocab_size=300)
    encode, calls = GigatokenEncoder.encode, list[str]()

    def encode_noted(self: GigatokenEncoder, text: str) -> Any:
        calls.append(text)
        return encode(self, text)

    monkeypatch.setattr(GigatokenEncoder, "encode", encode_noted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builds, "install", interrupt)
        build(bpe, workers=1)
    assert calls
    calls.clear()
    made = build(replace(bpe, encoder="reference"), workers=1)
    assert not calls
    assert stats.read_making(options.out)["encoder"] == fast.REFERENCE
    assert build(replace(bpe, out=tmp_path / "fresh"), workers=1).manifest == made.manifest


def test_no_documents_at_all(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])):
        pass
    with pytest.raises(UserError, match=r"a\.parquet: holds no documents"):
        build(replace(options, inputs=(str(path),)), workers=1)
