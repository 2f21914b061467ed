"""Shards staged on a node's own disk: the same run, and nothing unfinished or unnamed is left."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest

from hvdlm.data.manifest import read_manifest
from hvdlm.run import restore
from tests import helpers
from tests.single.data_sets import flip_bit, make_data_set

SHORT = ("--train.steps", "6", "--train.global_batch", "4", "--eval.every", "3", "--optim.warmup_steps", "1")
SIZES = {f"train-{i:05d}": 3000 for i in range(40)} | {"val-00000": 3000}
WATCHED = Path(__file__).with_name("watched_train.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "many"
    make_data_set(folder, SIZES)
    return folder


def watched(command: list[str]) -> list[str]:
    return [sys.executable, str(WATCHED), *command[3:]]


def val_losses(run_folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["val_loss"]) for row in helpers.rows(run_folder, "metrics.jsonl", kind="eval")]


def left_in(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.glob("*/*"))


def test_staged_or_not_it_is_the_same_run(data: Path, tmp_path: Path) -> None:
    disk, read, outputs = tmp_path / "disk", tmp_path / "read", {}
    env = {"NODE_DISK": str(tmp_path), "READ_FOLDERS": str(read)}
    for name, more in {
        "plain": (),
        "staged": ("--data.stage", "$NODE_DISK/disk"),
        "again": ("--data.stage", "${NODE_DISK}/disk"),
    }.items():
        command = helpers.train_command(data, tmp_path / name, *SHORT, *more)
        done = helpers.run([*helpers.mpirun(2), *watched(command)], env=env if more else {})
        assert done.returncode == 0, done.stdout
        outputs[name] = done.stdout
        assert helpers.losses(tmp_path / name) == helpers.losses(tmp_path / "plain")
        assert helpers.samples(tmp_path / name) == helpers.samples(tmp_path / "plain")
        assert val_losses(tmp_path / name) == val_losses(tmp_path / "plain")
    (folder,) = disk.iterdir()
    assert folder.name == f"hvdlm-{read_manifest(data).fingerprint[:16]}"
    assert set(read.read_text().splitlines()) == {f"train {folder}", f"val {folder}"}
    names = left_in(disk)
    assert "val-00000.h5" in names
    assert 10 < len(names) <= 6 * 4 + 1 < len(SIZES), "24 samples are in at most 24 shards"
    assert "staged to" not in outputs["plain"]
    assert f"staged to {folder} on 1 node(s): {len(names)} shard(s), 0." in outputs["staged"]
    assert "GiB/s), 0 of them reused" in outputs["staged"]
    assert f"GiB/s), {len(names)} of them reused" in outputs["again"]


def test_hints_for_shards_that_nothing_is_read_from_end_no_run(data: Path, tmp_path: Path) -> None:
    """Reading ahead announces whole chunks; staged are the shards of this run's samples alone."""
    for name, more in (("plain", ()), ("staged", ("--data.stage", str(tmp_path / "disk")))):
        command = helpers.train_command(data, tmp_path / name, *SHORT, "--data.shuffle_mb", "1", *more)
        done = helpers.run([*helpers.mpirun(2), *command])
        assert done.returncode == 0, done.stdout
    assert len(left_in(tmp_path / "disk")) < len(SIZES)
    assert helpers.losses(tmp_path / "staged") == helpers.losses(tmp_path / "plain")


def test_one_ranks_trouble_ends_all_with_its_line(data: Path, tmp_path: Path) -> None:
    own, disk = tmp_path / "own", tmp_path / "disk"
    shutil.copytree(data, own)
    shard = read_manifest(own).split("val")[0]
    flip_bit(own / shard.name, shard.extents.tokens.offset)
    command = [*helpers.mpirun(2), *helpers.train_command(own, tmp_path / "run", *SHORT)]
    for folder, expected in (
        (
            str(disk),
            f"{own / shard.name}: does not have the digest in the manifest; run python -m hvdlm.dataset",
        ),
        ("$NOWHERE_SET/x", "data.stage $NOWHERE_SET/x: the variable NOWHERE_SET is not set on this node"),
    ):
        done = helpers.run([*command, "--data.stage", folder])
        assert done.returncode == 2, done.stdout
        (line,) = [line for line in done.stdout.splitlines() if "error:" in line]
        assert expected in line
        assert "Traceback" not in done.stdout
        assert helpers.exit_record(tmp_path / "run")["exit_code"] == 2
    assert not [name for name in left_in(disk) if name.startswith(".tmp-") or name == shard.name]


def test_a_wish_to_stop_while_staging_saves_and_leaves_nothing_unfinished(data: Path, tmp_path: Path) -> None:
    disk, run_folder = tmp_path / "disk", tmp_path / "run"
    command = helpers.train_command(data, run_folder, *SHORT, "--data.stage", str(disk))
    with helpers.started([*helpers.mpirun(2), *watched(command)], {"SLOW_STAGE_S": "2"}) as process:
        helpers.wait_until(lambda: bool(left_in(disk)), within_s=60, what="staging begins")
        helpers.send(helpers.ranks_of(process)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "staging was stopped, reading from where the data is" in output
    assert helpers.exit_record(run_folder)["step"] == 1
    assert not [name for name in left_in(disk) if name.startswith(".tmp-")]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    assert "staged to" in done.stdout


def test_killed_while_staging_the_next_start_goes_on(data: Path, tmp_path: Path) -> None:
    disk, run_folder = tmp_path / "disk", tmp_path / "run"
    command = helpers.train_command(data, run_folder, *SHORT, "--data.stage", str(disk))
    with helpers.started(watched(command), {"SLOW_STAGE_S": "1"}) as process:
        helpers.wait_until(lambda: len(left_in(disk)) > 1, within_s=60, what="staging goes on")
        helpers.send(process, signal.SIGKILL)
        process.wait(timeout=20)
    assert [name for name in left_in(disk) if name.startswith(".tmp-")]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    assert ", 0 of them reused" not in done.stdout
    assert not [name for name in left_in(disk) if name.startswith(".tmp-")]
    assert restore.newest_valid(run_folder / "checkpoints")[0]
