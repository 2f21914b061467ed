from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from data_sets import flip_bit, make_data_set

from hvdlm.config import UserError
from hvdlm.data import stage, touched
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import Manifest
from hvdlm.data.stage import Staged, prepare_stage, stage_folder, stage_shards
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
    names = NAMES if names is None else names
    prepare_stage(data[1], names, to)
    return stage_shards(*data, names, to, share=share, stop=threading.Event())


def needed(manifest: Manifest, *, shares: list[tuple[int, int]], steps: tuple[int, int]) -> list[str]:
    samples = samples_of(PLAN, start_step=steps[0], end_step=steps[1], shares=shares)
    return touched_shards(manifest, "train", samples, seq_len=PLAN.seq_len, seed=PLAN.seed)


def read_by_loader(data: tuple[Path, Manifest], share: tuple[int, int], steps: tuple[int, int]) -> set[str]:
    loader = Loader(*data, "train", plan=PLAN, share=share, prefetch_steps=0)
    entries, places, found = data[1].split("train"), loader._places(steps[0] + 1, 1), set()
    while loader._slots and (place := next(places))[0] <= steps[1]:
        found |= {entries[shard].name for slot in place[1] for shard in slot}
    return found


@pytest.mark.parametrize("steps", [(0, 1), (4, 5), (7, 9), (2, 2), (3, 80)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_exactly_the_shards_that_the_loaders_will_read(
    data: tuple[Path, Manifest], steps: tuple[int, int], ranks: int
) -> None:
    shares = [(d, ranks) for d in range(ranks)]
    for node in (shares[: ranks // 2], shares[ranks // 2 :]):
        expected = set().union(*(read_by_loader(data, share, steps) for share in node))
        names = needed(data[1], shares=node, steps=steps)
        assert set(names) == expected
        assert names == sorted(names)
    if steps == (0, 1):
        assert 1 < len(needed(data[1], shares=shares, steps=steps)) < len(TRAIN), "or it proves nothing"


def test_a_long_run_is_not_looked_at_to_its_end(
    data: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(limit: int):
        for block in range(limit):
            yield np.arange(block * 100, block * 100 + 100)
        raise AssertionError("looked on although every shard was touched")

    every = [f"{name}.h5" for name in TRAIN]  # train-00012 is shorter than a sample.
    assert touched_shards(data[1], "train", samples(20), seq_len=16, seed=3) == every
    monkeypatch.setattr(touched, "_MOST_SAMPLES", 1)
    assert touched_shards(data[1], "train", [np.zeros(1, np.int64)], seq_len=16, seed=3) == every


def test_a_split_without_a_sample_touches_nothing(data: tuple[Path, Manifest]) -> None:
    assert touched_shards(data[1], "train", [np.arange(9)], seq_len=5000, seed=3) == []


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
        with pytest.raises(UserError, match=r"0\.00 GiB are free on .*, the 3 shard\(s\) to copy need 0\.0"):
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


def test_a_folder_that_cannot_be_written_is_named(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for to in (tmp_path / "file" / "hvdlm-x", Path("/proc/hvdlm-x")):
        with pytest.raises(UserError, match=rf"data.stage {to.parent}: {to} cannot be written") as caught:
            prepare_stage(data[1], NAMES, to)
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
    prepare_stage(data[1], NAMES, to)
    assert stage_shards(*data, NAMES, to, share=(0, 1), stop=stop) is None
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
manifest = read_manifest(folder)
stage.stage_shards(folder, manifest, sys.argv[3:], to, share=(0, 1), stop=threading.Event())
"""


def test_what_a_killed_copy_left_is_removed_and_what_lives_is_not(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    to = tmp_path / "disk"
    to.mkdir()
    command = [sys.executable, "-c", SLOW, str(data[0]), str(to), *NAMES]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        prepare_stage(data[1], NAMES, to)
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
    loader = Loader(to, data[1], "train", plan=PLAN, share=(0, 1), prefetch_steps=0, check_sizes=False)
    with pytest.raises(UserError, match=r"has 7 bytes.*start the run again, which looks over what is staged"):
        list(zip(loader.steps(0), range(30), strict=False))
