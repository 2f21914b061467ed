"""What a user can get wrong: one line that names the file and the cure, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import helpers


def fails(command: list[str], exit_code: int, *expected: str) -> str:
    """Run a command that must fail with one line of error."""
    done = helpers.run(command)
    assert done.returncode == exit_code, done.stdout
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stdout
    for text in expected:
        assert text in lines[0]
    return done.stdout


def train(data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = helpers.run(helpers.train_command(data, run, *more))
    assert done.returncode == 0, done.stdout
    return done


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    shutil.copytree(tiny_data, tmp_path / "own")
    return tmp_path / "own"


def train_shard(data: Path) -> Path:
    return next(data.glob("train-*.h5"))


def test_missing_data_under_two_ranks(tmp_path: Path) -> None:
    command = helpers.train_command(tmp_path / "nowhere", tmp_path / "run")
    fails([*helpers.mpirun(2), *command], 2, "nowhere: no manifest.json", "python -m hvdlm.preprocess")
    assert not (tmp_path / "run").exists()


def test_bad_config_under_two_ranks_is_said_once(tiny_data: Path, tmp_path: Path) -> None:
    command = helpers.train_command(tiny_data, tmp_path / "run", "--train.micro_batch", "3")
    fails([*helpers.mpirun(2), *command], 2, "global_batch 8 is not a multiple of train.micro_batch 3")


def test_a_truncated_shard(own_data: Path, tmp_path: Path) -> None:
    shard = train_shard(own_data)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    fails(helpers.train_command(own_data, tmp_path / "run"), 2, shard.name, "truncated", "dataset repair")


def test_another_tokenizer_beside_the_shards(own_data: Path, tmp_path: Path) -> None:
    path = own_data / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    fails(helpers.train_command(own_data, tmp_path / "run"), 2, str(path), "the shards were made with")
    path.unlink()
    fails(helpers.train_command(own_data, tmp_path / "run"), 2, str(path), "cannot be read")


@pytest.mark.parametrize("when", ["background", "before"])
def test_a_flipped_bit_stops_the_run_and_names_shard_and_block(
    when: str, own_data: Path, tmp_path: Path
) -> None:
    shard = train_shard(own_data)
    content = bytearray(shard.read_bytes())
    # The tokens begin at an aligned place; a byte in their middle keeps its id below the vocabulary.
    place = content.find(b"return".decode().encode("utf-16-le"))
    assert place > 0
    content[place] ^= 1
    shard.write_bytes(content)
    command = helpers.train_command(
        own_data,
        tmp_path / "run",
        "--data.verify",
        when,
        "--train.steps",
        "100000",
        "--checkpoint.every",
        "0",
    )
    fails([*helpers.mpirun(2), *command], 2, shard.name, "block 0", "python -m hvdlm.dataset repair")


def test_other_data_or_another_model_on_resume(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_data, run, "--train.steps", "10")
    command = helpers.train_command(tiny_data, run)
    fails([*command, "--model.width", "64"], 2, "step-00000010", "model.width was 32, is 64")
    fails([*command, "--optim.lr", "1e-2"], 2, "optim.lr was 0.006, is 0.01")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"other text {i} " * 100)
    other = tmp_path / "other"
    preprocess = [
        command[0],
        "-m",
        "hvdlm.preprocess",
        str(texts),
        "--out",
        str(other),
        "--tokenizer",
        "byte",
    ]
    assert helpers.run([*preprocess, "--val-fraction", "0.3"]).returncode == 0
    fails(helpers.train_command(other, run), 2, "was trained on other data", "--data.new_stage true")
    assert helpers.exit_record(run)["state"] == "done"
    assert "resumed from" in train(tiny_data, run).stdout


def test_evaluating_with_the_data_of_another_tokenizer(tiny_data: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    train(tiny_data, run, "--train.steps", "10")
    python = helpers.train_command(tiny_data, run)[0]
    texts = tiny_data.parent / "texts"
    words = [python, "-m", "hvdlm.preprocess", str(texts), "--out", str(other), "--tokenizer", "word"]
    assert helpers.run([*words, "--val-fraction", "0.2"]).returncode == 0
    command = [python, "-m", "hvdlm.evaluate", str(run)]
    fails([*command, "--data.path", str(other)], 2, "other: was made with tokenizer", "preprocess again")
    fails([python, "-m", "hvdlm.evaluate", str(tmp_path / "nowhere")], 2, "no such run folder")


def test_a_loss_that_is_no_number(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    diverging = (
        "--optim.lr",
        "1e30",
        "--optim.clip",
        "0",
        "--optim.warmup_steps",
        "0",
        "--checkpoint.every",
        "5",
        "--train.steps",
        "90",
    )
    command = helpers.train_command(tiny_data, run, *diverging)
    output = fails([*helpers.mpirun(2), *command], 1, "not finite 10 time(s) in a row", "lower optim.lr")
    assert "SKIPPED" in output
    assert helpers.exit_record(run)["state"] == "failed"
    skipped = helpers.rows(run, "metrics.jsonl", kind="train", skipped=True)
    assert len(skipped) == 10
    assert all(row["grad_norm"] is None for row in skipped)
    # The checkpoint of step 10 remembers nine of them.
    fails(command, 1, "step 11: loss or gradient not finite 10 time(s)")
    # A run that ends so is not done.
    short = helpers.train_command(tiny_data, tmp_path / "short", *diverging, "--train.steps", "4")
    fails(short, 1, "step 4: loss or gradient not finite 3 time(s)")
    assert helpers.exit_record(tmp_path / "short")["state"] == "failed"


def test_a_full_disk_while_saving_keeps_the_older_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with helpers.small_disk(disk, size_kib=1000):
        command = helpers.train_command(tiny_data, disk / "run", "--checkpoint.every", "5")
        fails([*helpers.mpirun(2), *command], 1, str(disk), "No space left", "free space in the run folder")
        assert not list((disk / "run" / "checkpoints").glob("*.tmp-*"))
        kept = sorted(p.name for p in (disk / "run" / "checkpoints").glob("step-????????"))
        assert kept
        resumed = helpers.run(
            [*helpers.train_command(tiny_data, disk / "run"), "--train.steps", kept[-1][-2:]]
        )
        assert "finished" in resumed.stdout
        assert resumed.returncode == 0


def test_a_run_folder_that_cannot_be_written_any_more(tiny_data: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with helpers.small_disk(disk, size_kib=4000):
        command = helpers.train_command(tiny_data, disk / "run")
        train(tiny_data, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        more = [*helpers.mpirun(2), *command, "--train.steps", "30"]
        fails(more, 2, str(disk / "run"), "Read-only file system", "choose another train.out")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert "resumed from" in train(tiny_data, disk / "run", "--train.steps", "30").stdout


def test_a_damaged_checkpoint_is_passed_over(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_data, run)
    newest = run / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = train(tiny_data, run)
    assert "step-00000020.corrupt" in again.stdout
    assert "resumed from" in again.stdout
    assert "step-00000010" in again.stdout


def test_a_gpu_that_is_not_there(tiny_data: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = helpers.train_command(tiny_data, tmp_path / "run", "--train.device", "cuda")
    fails(command, 2, "torch sees no GPU")
