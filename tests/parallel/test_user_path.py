"""The README's commands in their order, as a user types them, in an empty folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests import helpers

SHORT = ["--train.steps", "12", "--eval.batches", "1", "--checkpoint.every", "6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def hvdlm(home: Path, *words: str, launcher: tuple[str, ...] = ()) -> str:
    done = helpers.run([*launcher, sys.executable, "-m", *words], cwd=home)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The run of the first test, where that was selected; else one like it."""
    if not (home / "data" / "runs" / "demo" / "exit.json").is_file():
        hvdlm(home, "hvdlm.train", *SHORT)
    return home


def test_train_without_data_shards_the_demo_corpus_first(home: Path) -> None:
    output = hvdlm(home, "hvdlm.train", *SHORT, launcher=("horovodrun", "-np", "4"))
    assert (home / "data" / "demo" / "manifest.json").is_file()
    assert "done: 12 steps; next: python -m hvdlm.evaluate data/runs/demo" in output
    assert helpers.exit_record(home / "data" / "runs" / "demo")["state"] == "done"


def test_preprocess_finds_it_done(home: Path) -> None:
    before = (home / "data" / "demo" / "manifest.json").read_bytes()
    hvdlm(home, "hvdlm.preprocess")
    assert (home / "data" / "demo" / "manifest.json").read_bytes() == before


def test_the_data_set_verifies(home: Path) -> None:
    hvdlm(home, "hvdlm.dataset", "verify", "data/demo")
    inspected = hvdlm(home, "hvdlm.dataset", "inspect", "data/demo", "--document", "0")
    compile(inspected, "document 0", "exec")


@pytest.mark.long
def test_evaluate_gives_the_same_on_one_and_two_ranks(trained: Path) -> None:
    one, two = (
        json.loads(hvdlm(trained, "hvdlm.evaluate", launcher=launcher).strip().splitlines()[-1])
        for launcher in ((), tuple(helpers.mpirun(2)))
    )
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    manifest = json.loads((trained / "data" / "demo" / "manifest.json").read_text())
    val = [shard for shard in manifest["shards"] if shard["split"] == "val"]
    assert one["tokens"] == sum(shard["tokens"] - 1 for shard in val)
    text_bytes = sum(shard["text_bytes"] for shard in val)
    assert one["bits_per_byte"] == pytest.approx(one["loss"] * one["tokens"] / (math.log(2) * text_bytes))


def test_generate_and_export(home: Path) -> None:
    words = ["--prompt", "def ", "--max-tokens", "20", "--seed", "1"]
    first = hvdlm(home, "hvdlm.generate", "data/runs/demo", *words)
    assert first.startswith("def ")
    assert hvdlm(home, "hvdlm.generate", "data/runs/demo", *words) == first
    hvdlm(home, "hvdlm.export", "data/runs/demo", "--out", "hf", "--format", "hf")
    assert (home / "hf" / "model.safetensors").is_file()


def test_training_goes_on_from_the_exported_weights(home: Path) -> None:
    output = hvdlm(home, "hvdlm.train", *SHORT, "--model.init", "hf", "--train.out", "continued")
    evaluated = json.loads(hvdlm(home, "hvdlm.evaluate").strip().splitlines()[-1])
    first = helpers.rows(home / "continued", "metrics.jsonl", kind="eval", step=0)[0]["val_loss"]
    assert first == pytest.approx(evaluated["loss"], rel=0.1), output
    # A run that goes on has its own weights.
    (home / "hf").rename(home / "moved")
    more = ["--model.init", "hf", "--train.out", "continued", "--train.steps", "13"]
    hvdlm(home, "hvdlm.train", *SHORT, *more, launcher=tuple(helpers.mpirun(2)))


def test_a_longer_run_of_the_same_folder(home: Path) -> None:
    output = hvdlm(home, "hvdlm.train", *SHORT, "--train.steps", "14", "--log.tensorboard", "true")
    assert "train.steps was 12, is 14" in output
    assert list((home / "data" / "runs" / "demo" / "tensorboard").iterdir())


def test_bench_step(home: Path) -> None:
    output = hvdlm(
        home, "hvdlm.bench", "step", "--json", "--blocks", "4", "--block-steps", "1", "--micro-batch", "1"
    )
    result = json.loads(output.strip().splitlines()[-1])["loop"]
    assert result["blocks"] == 4
    assert result["loop_ms"] > 0 < result["bare_ms"]
