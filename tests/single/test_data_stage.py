from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_sets import flip_bit, make_data_set

from hvdlm.config import UserError
from hvdlm.data import locality, stage, touched
from hvdlm.data.blend import ALONE, Blend
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import Manifest
from hvdlm.data.sources import Source, shards_of
from hvdlm.data.stage import Copy, Staged, prepare_stage, stage_folder, stage_shards
from hvdlm.data.touched import samples_of, touched_shards
from tests import helpers

TRAIN = {f"train-{i:05d}": 300 + 40 * i for i in range(12)}
SIZES = TRAIN | {"train-00012": 5, "val-00000": 203}
PLAN = BatchPlan(seq_len=16, global_batch=12, micro_batch=2, seed=3)
NAMES = ["train-00001.h5", "train-00004.h5", "val-00000.h5"]


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path / "data", make_data_set(tmp_path / "data", SIZES)[0]


def staged(
    data: tuple[Path, Manifest], to: Path, *, share: tuple[int, int] = (0, 1), names: list[str] | None = None
) -> Staged | None:
    copies = copies_of(data, to, NAMES if names is None else names)
    prepare_stage(copies)
    return stage_shards(copies, share=share, stop=threading.Event())


def copies_of(data: tuple[Path, Manifest], to: Path, names: list[str]) -> list[Copy]:
    return [Copy(entry, data[0], to) for entry in data[1].shards if entry.name in names]


def touched_names(
    sources: list[Source], samples: Iterable[np.ndarray], *, plan: BatchPlan = PLAN, blend: Blend = ALONE
) -> list[str]:
    shards = touched_shards(sources, "train", samples, plan=plan, blend=blend)
    return [f"{folder.name}/{entry.name}" for folder, entry in shards]


def read_by_loader(
    sources: list[Source], share: tuple[int, int], steps: tuple[int, int], *, plan: BatchPlan, blend: Blend
) -> set[str]:
    loader = Loader(sources, "train", plan=plan, blend=blend, share=share, prefetch_steps=0)
    shards, places, found = shards_of(sources, "train"), loader._places(steps[0] + 1, 1), set()
    while loader._slots and (place := next(places))[0] <= steps[1]:
        read = (shards[shard] for slot in place[1] for shard in slot)
        found |= {f"{folder.name}/{entry.name}" for folder, entry in read}
    return found


@pytest.mark.parametrize("steps", [(0, 1), (4, 5), (7, 9), (2, 2), (3, 80)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
@pytest.mark.parametrize("shuffle_mb", [0, 1])
@pytest.mark.parametrize("blend", [ALONE, Blend((3, 1), (0, 0)), Blend((2, 5), (7, 90), 24)])
def test_exactly_the_shards_that_the_loaders_will_read(
    data: tuple[Path, Manifest],
    tmp_path: Path,
    blend: Blend,
    shuffle_mb: int,
    ranks: int,
    steps: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locality, "CHUNK_BYTES", 400)
    plan, steps = replace(PLAN, shuffle_mb=shuffle_mb), (steps[0] + 2, steps[1] + 2)
    sources = [Source(*data)]
    if len(blend.weights) == 2:
        other = make_data_set(tmp_path / "other", {f"train-{i:05d}": 190 + i for i in range(9)})[0]
        sources.append(Source(tmp_path / "other", other))
    shares = [(d, ranks) for d in range(ranks)]
    every = len(shards_of(sources, "train"))
    for node in (shares[: ranks // 2], shares[ranks // 2 :]):
        read = (read_by_loader(sources, share, steps, plan=plan, blend=blend) for share in node)
        samples = samples_of(plan, start_step=steps[0], end_step=steps[1], shares=node)
        names = touched_names(sources, samples, plan=plan, blend=blend)
        assert set(names) == set().union(*read)
        if node and steps == (2, 3):
            assert 1 < len(names) < every - 1, "or it proves nothing"


def test_a_long_run_is_not_looked_at_to_its_end(
    data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(limit: int):
        for block in range(limit):
            yield np.arange(block * 100, block * 100 + 100)
        raise AssertionError("looked on although every shard was touched")

    every = [f"data/{name}.h5" for name in TRAIN]  # train-00012 is shorter than a sample.
    assert touched_names([Source(*data)], samples(20)) == every
    monkeypatch.setattr(touched, "_MOST_SAMPLES", 1)
    assert touched_names([Source(*data)], [np.zeros(1, np.int64)]) == every


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shares_copy_what_is_named_and_nothing_else(
    data: tuple[Path, Manifest], tmp_path: Path, parts: int
) -> None:
    to = tmp_path / "deep" / "disk"
    shares = [staged(data, to, share=(index, parts)) for index in range(parts)]
    assert [share.files for share in shares] == [len(NAMES[index::parts]) for index in range(parts)]
    assert sorted(path.name for path in to.iterdir()) == NAMES
    for name in NAMES:
        assert (to / name).read_bytes() == (data[0] / name).read_bytes()


def test_a_second_start_reuses_what_is_intact_and_copies_the_rest(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    to, sizes = tmp_path / "disk", {entry.name: entry.file_bytes for entry in data[1].shards}
    total = sum(sizes[name] for name in NAMES)
    assert staged(data, to) == Staged(3, total, 0)
    untouched = (to / NAMES[0]).stat().st_ino
    assert staged(data, to) == Staged(3, total, 3)
    flip_bit(to / NAMES[1], sizes[NAMES[1]] - 1)
    os.truncate(to / NAMES[2], 10)
    assert staged(data, to) == Staged(3, total, 1)
    assert (to / NAMES[0]).stat().st_ino == untouched
    for name in NAMES:
        assert (to / name).read_bytes() == (data[0] / name).read_bytes()


@pytest.mark.parametrize("where", ["tokens", "header", "end"])
def test_a_flipped_bit_in_the_source_is_named_and_never_staged(
    data: tuple[Path, Manifest], tmp_path: Path, where: str
) -> None:
    entry = data[1].shards[4]
    offset = {"tokens": entry.extents.tokens.offset + 7, "header": 0, "end": entry.file_bytes - 1}[where]
    flip_bit(data[0] / entry.name, offset)
    expected = (
        rf"data/{entry.name}: does not have the digest .* run python -m hvdlm.dataset repair {data[0]},"
    )
    with pytest.raises(UserError, match=expected):
        staged(data, tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == NAMES[:1]


def test_a_missing_or_truncated_source_is_named(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    os.truncate(data[0] / NAMES[0], 100)
    with pytest.raises(UserError, match=rf"{NAMES[0]}: has 100 bytes, the manifest says"):
        staged(data, tmp_path / "disk")
    (data[0] / NAMES[0]).unlink()
    with pytest.raises(UserError, match=rf"{NAMES[0]}: missing"):
        staged(data, tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir()) == []


def test_too_little_space_is_known_before_the_first_byte(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    disk, sizes = tmp_path / "disk", {entry.name: entry.file_bytes for entry in data[1].shards}
    with helpers.small_disk(disk, size_kib=(sizes[NAMES[0]] + sizes[NAMES[1]]) // 1024 + 64):
        with pytest.raises(
            UserError, match=r"\d+ MiB are free on .*, the 3 shard\(s\) to copy need \d+ MiB;"
        ):
            staged(data, disk / "hvdlm-x")
        assert list((disk / "hvdlm-x").iterdir()) == []
        # One fits, and is not counted again once it is there.
        assert staged(data, disk / "hvdlm-x", names=NAMES[:1])
        assert staged(data, disk / "hvdlm-x", names=NAMES[:2])
        with pytest.raises(UserError, match=r"the 1 shard\(s\) to copy need"):
            staged(data, disk / "hvdlm-x")


def test_a_damaged_copy_gives_its_space_back_before_it_is_replaced(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with helpers.small_disk(disk, size_kib=data[1].shards[1].file_bytes // 1024 + 64):
        assert staged(data, disk, names=NAMES[:1])
        flip_bit(disk / NAMES[0], 5)
        assert staged(data, disk, names=NAMES[:1]).reused == 0


def test_the_folder_is_found_through_the_environment(data: tuple[Path, Manifest]) -> None:
    name = f"hvdlm-{data[1].fingerprint[:16]}"
    env = {"TMPDIR": "/local/7", "USER": "ada", "EMPTY": ""}
    assert stage_folder("/fast", data[1], env) == Path("/fast") / name
    assert stage_folder("$TMPDIR/${USER}", data[1], env) == Path("/local/7/ada") / name
    for bad, variable in (
        ("$NOPE/x", "NOPE"),
        ("${NOPE}", "NOPE"),
        ("$EMPTY", "EMPTY"),
        ("${A:-/tmp}", "A:-"),
    ):
        with pytest.raises(UserError, match=rf"the variable {variable}.* is not set on this node") as caught:
            stage_folder(bad, data[1], env)
        assert caught.value.exit_code == 2


def test_the_home_folder_may_be_meant(data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert stage_folder("~/stage", data[1], {}).parent == Path("/home/me/stage")


def test_a_folder_that_cannot_be_written_is_named(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for to in (tmp_path / "file" / "hvdlm-x", Path("/proc/hvdlm-x")):
        with pytest.raises(UserError, match=rf"data.stage {to.parent}: {to} cannot be written") as caught:
            prepare_stage(copies_of(data, to, NAMES))
        assert caught.value.exit_code == 2


def test_a_stop_in_the_middle_of_a_file_leaves_nothing_unfinished(
    data: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, to = threading.Event(), tmp_path / "disk"

    def write_and_stop(fd: int, piece: memoryview, place: int) -> None:
        assert place == 0, "went on"
        assert [path.name.startswith(".tmp-") for path in to.iterdir()] == [True]
        stop.set()

    monkeypatch.setattr(stage, "_PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(stage, "write_exactly", write_and_stop)
    copies = copies_of(data, to, NAMES)
    prepare_stage(copies)
    assert stage_shards(copies, share=(0, 1), stop=stop) is None
    assert list(to.iterdir()) == []


SLOW = """
import sys, threading, time
from pathlib import Path
from hvdlm.data import stage
from hvdlm.data.manifest import read_manifest
write = stage.write_exactly
def slow(*arguments):
    write(*arguments)
    print("writing", flush=True)
    time.sleep(20)
stage.write_exactly = slow
folder, to = map(Path, sys.argv[1:3])
copies = [stage.Copy(e, folder, to) for e in read_manifest(folder).shards if e.name in sys.argv[3:]]
stage.stage_shards(copies, share=(0, 1), stop=threading.Event())
"""


def test_what_a_killed_copy_left_is_removed_and_what_lives_is_not(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    to = tmp_path / "disk"
    to.mkdir()
    command = [sys.executable, "-c", SLOW, str(data[0]), str(to), *NAMES]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        prepare_stage(copies_of(data, to, NAMES))
        (left,) = to.iterdir()
        assert left.name.startswith(".tmp-"), "another run's copy was taken away"
        process.send_signal(signal.SIGKILL)
    assert staged(data, to).files == 3
    assert sorted(path.name for path in to.iterdir()) == NAMES


def test_a_damaged_copy_is_cured_by_another_start(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    to = stage_folder(str(tmp_path), data[1], {})
    names = [entry.name for entry in data[1].split("train")]
    staged(data, to, names=names)
    os.truncate(to / names[0], 7)
    loader = Loader(
        [Source(to, data[1])], "train", plan=PLAN, share=(0, 1), prefetch_steps=0, check_sizes=False
    )
    with pytest.raises(
        UserError, match=r"has 7 bytes.*start the run again, which looks over what is staged"
    ) as e:
        list(zip(loader.steps(0), range(30), strict=False))
    assert e.value.exit_code == 1, "of a job that is queued again it is worth another try"


def test_a_folder_in_the_place_of_a_copy_is_one_line(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    to = stage_folder(str(tmp_path), data[1], {})
    (to / NAMES[0]).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{NAMES[0]}: cannot be written: Is a directory"):
        staged(data, to)
