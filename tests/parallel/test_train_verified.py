"""Blocks that were verified once are not read again, on however many ranks a run goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hvdlm.data.entries import BLOCK_TOKENS
from hvdlm.data.manifest import read_manifest
from tests import helpers
from tests.single.data_sets import flip_bit, make_data_set

SIZES = {
    "train-00000": 5 * BLOCK_TOKENS,
    "train-00001": 4 * BLOCK_TOKENS + 7,
    "val-00000": 2 * BLOCK_TOKENS + 5,
}
BLOCKS = [
    f"{name}.h5 {block}"
    for name, count in (("train-00000", 5), ("train-00001", 5), ("val-00000", 3))
    for block in range(count)
]
FIRST_SHARE, SECOND_SHARE = BLOCKS[:6], BLOCKS[6:]
WATCHED = Path(__file__).with_name("watched_train.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "blocks"
    make_data_set(folder, SIZES)
    return folder


def watched(data: Path, run_folder: Path, steps: int, *more: str) -> list[str]:
    command = helpers.train_command(
        data, run_folder, "--train.steps", str(steps), "--eval.batches", "0", *more
    )
    return [sys.executable, str(WATCHED), *command[3:]]


def verified(run_folder: Path) -> object:
    newest = max((run_folder / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())["verified"]


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run on two ranks, stopped when each has verified two blocks; and the step it was stopped at."""
    run_folder = tmp_path_factory.mktemp("runs") / "stopped"
    env = {"MOST_BLOCKS": "2", "READ_BLOCKS": str(run_folder.parent / "first")}
    with helpers.started([*helpers.mpirun(2), *watched(data, run_folder, 100_000)], env) as process:
        helpers.wait_for_step(run_folder, 1)
        helpers.wait_until(
            lambda: len((run_folder.parent / "first").read_text().splitlines()) == 4,
            within_s=30,
            what="two ranks verified two blocks each",
        )
        (run_folder / "STOP").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    return run_folder, helpers.exit_record(run_folder)["step"]


def go_on(
    stopped: tuple[Path, int], data: Path, tmp_path: Path, *more: str, ranks: int = 1
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Five more steps of a copy of the run: its output, and the blocks that were read."""
    run_folder, read = tmp_path / "run", tmp_path / "read"
    shutil.copytree(stopped[0], run_folder)
    read.touch()
    launcher = helpers.mpirun(ranks) if ranks > 1 else []
    command = watched(data, run_folder, stopped[1] + 5, "--checkpoint.every", "1", *more)
    done = helpers.run([*launcher, *command], env={"READ_BLOCKS": str(read)})
    return done, read.read_text().splitlines()


def test_each_block_is_verified_once_over_all_attempts(
    stopped: tuple[Path, int], data: Path, tmp_path: Path
) -> None:
    first = (stopped[0].parent / "first").read_text().splitlines()
    fingerprint = read_manifest(data).fingerprint
    assert sorted(first) == sorted([*FIRST_SHARE[:2], *SECOND_SHARE[:2]])
    assert verified(stopped[0]) == {fingerprint: [[0, 2], [6, 8]]}
    done, second = go_on(stopped, data, tmp_path, ranks=3)
    assert done.returncode == 0, done.stdout
    assert "verification: 30 % known from earlier attempts" in done.stdout
    assert Counter(first + second) == Counter(BLOCKS)
    assert verified(tmp_path / "run") == {fingerprint: [[0, len(BLOCKS)]]}
    done, third = go_on((tmp_path / "run", stopped[1] + 5), data, tmp_path / "third")
    assert done.returncode == 0, done.stdout
    assert "verification: 100 % known from earlier attempts" in done.stdout
    assert third == []


def test_a_flipped_bit_is_found_where_it_is_not_known_and_everywhere_before(
    stopped: tuple[Path, int], data: Path, tmp_path: Path
) -> None:
    entry = read_manifest(data).shards[1]
    unknown = entry.extents.tokens.offset + 2 * 4 * BLOCK_TOKENS + 6
    flip_bit(data / entry.name, unknown)
    done, _ = go_on(stopped, data, tmp_path / "unknown")
    flip_bit(data / entry.name, unknown)
    assert done.returncode == 2, done.stdout
    assert f"{entry.name}: block 4: tokens {4 * BLOCK_TOKENS} to" in done.stdout
    known = entry.extents.tokens.offset + 2 * BLOCK_TOKENS
    flip_bit(data / entry.name, known)
    done, read = go_on(stopped, data, tmp_path / "known", "--data.verify", "before")
    flip_bit(data / entry.name, known)
    assert done.returncode == 2, done.stdout
    assert f"{entry.name}: block 1: tokens" in done.stdout
    assert read == BLOCKS[:7]


def test_off_keeps_what_is_known_and_before_knows_all(
    stopped: tuple[Path, int], data: Path, tmp_path: Path
) -> None:
    done, read = go_on(stopped, data, tmp_path / "off", "--data.verify", "off")
    assert (done.returncode, read) == (0, []), done.stdout
    assert verified(tmp_path / "off" / "run") == verified(stopped[0])
    done, read = go_on(stopped, data, tmp_path / "before", "--data.verify", "before")
    assert (done.returncode, read) == (0, BLOCKS), done.stdout
    assert list(verified(tmp_path / "before" / "run").values()) == [[[0, len(BLOCKS)]]]


def test_a_copy_elsewhere_is_verified_anew(stopped: tuple[Path, int], data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "moved")
    done, read = go_on(stopped, tmp_path / "moved", tmp_path / "again")
    assert done.returncode == 0, done.stdout
    assert "known from earlier attempts" not in done.stdout
    assert read == BLOCKS


def test_the_same_words_for_another_folder_are_no_proof(
    data: Path, tmp_path: Path, stopped: tuple[Path, int]
) -> None:
    """A project that was copied, with `data.path` relative to it; a link to the same folder is the same."""
    for place in ("here", "there"):
        shutil.copytree(data, tmp_path / place / "set")
    (tmp_path / "link").symlink_to(tmp_path / "here")

    def train(place: str, steps: int) -> str:
        command = watched(Path("set"), tmp_path / "run", steps)
        done = helpers.run(command, cwd=tmp_path / place)
        assert done.returncode == 0, done.stdout
        return done.stdout

    train("here", 5)
    assert verified(tmp_path / "run") == {read_manifest(data).fingerprint: [[0, len(BLOCKS)]]}
    assert "100 % known from earlier attempts" in train("link", 6)
    assert "known from earlier attempts" not in train("there", 7)


def test_a_run_that_ends_before_its_verification_says_so(data: Path, tmp_path: Path) -> None:
    done = helpers.run(watched(data, tmp_path / "run", 3), env={"MOST_BLOCKS": "2"})
    assert done.returncode == 0, done.stdout
    assert f"verification: 11 block(s) were not reached; python -m hvdlm.dataset verify {data}" in done.stdout
    assert "done: 3 steps" in done.stdout


def test_evaluate_reads_nothing_that_was_not_checked(tiny_data: Path, tmp_path: Path) -> None:
    run_folder, own = tmp_path / "run", tmp_path / "own set"
    assert helpers.run(helpers.train_command(tiny_data, run_folder, "--train.steps", "2")).returncode == 0
    shutil.copytree(tiny_data, own)
    command = [sys.executable, "-m", "hvdlm.evaluate", str(run_folder), "--data.path", str(own)]
    train, val = (read_manifest(own).split(split)[0] for split in ("train", "val"))
    flip_bit(own / train.name, train.extents.tokens.offset)
    assert helpers.run(command).returncode == 0, "that split is not read"
    flip_bit(own / val.name, val.extents.tokens.offset)
    done = helpers.run([*helpers.mpirun(2), *command])
    assert done.returncode == 2, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "error:" in line]
    assert f"{own / val.name}: block 0: tokens 0 to" in line
    assert f"run python -m hvdlm.dataset repair '{own}', or copy" in line


def test_before_can_be_stopped_and_trains_on_nothing(data: Path, tmp_path: Path) -> None:
    run_folder, read = tmp_path / "run", tmp_path / "read"
    command = [*helpers.mpirun(2), *watched(data, run_folder, 3, "--data.verify", "before")]
    with helpers.started(command, {"MOST_BLOCKS": "2", "READ_BLOCKS": str(read)}) as process:
        helpers.wait_until(
            lambda: read.exists() and len(read.read_text().splitlines()) == 4,
            within_s=60,
            what="two ranks verified two blocks each",
        )
        helpers.send(helpers.ranks_of(process)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped while data.verify = before read the data; the same command begins again" in output
    assert "Traceback" not in output
    assert not list((run_folder / "checkpoints").glob("step-*"))
    assert helpers.exit_record(run_folder)["exit_code"] == 75
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
