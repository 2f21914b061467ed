"""Blends through the real command: the same on any number of ranks, changed only on demand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import helpers


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the same tokenizer, other text."""
    folder = tmp_path_factory.mktemp("other")
    for i in range(20):
        text = f"Once upon a time there were {i} ranks in a ring.\n" * 20
        (folder / f"{i:02}.txt").write_text(text)
    return preprocess(folder, folder / "shards", "byte")


def preprocess(texts: Path, out: Path, tokenizer: str) -> Path:
    command = [sys.executable, "-m", "hvdlm.preprocess", str(texts / "*.txt"), "--out", str(out)]
    command += ["--tokenizer", tokenizer, "--val-fraction", "0.3", "--workers", "1"]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    return out


def train(path: Any, out: Path, *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    text = path if isinstance(path, str) else json.dumps({str(folder): w for folder, w in path.items()})
    command = helpers.train_command(Path("unused"), out, "--data.path", text, *more)
    return helpers.run([*helpers.mpirun(ranks), *command] if ranks > 1 else command)


def state(run: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / f"checkpoints/step-{step:08}/state.json").read_text())
    return content


@pytest.fixture(scope="module")
def blended(tiny_data: Path, other_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "blended"
    done = train({tiny_data: 3, other_data: 1}, run)
    assert done.returncode == 0, done.stdout
    assert "weight 3 of 4" in done.stdout
    return run


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_blend_is_the_same_run_on_any_number_of_ranks(
    ranks: int, tiny_data: Path, other_data: Path, tmp_path: Path, blended: Path
) -> None:
    done = train({tiny_data: 3, other_data: 1}, tmp_path / "run", ranks=ranks)
    assert done.returncode == 0, done.stdout
    assert helpers.samples(tmp_path / "run") == helpers.samples(blended)
    found, expected = helpers.losses(tmp_path / "run"), helpers.losses(blended)
    assert found == pytest.approx(expected, rel=1e-4) and len(expected) == 20


def test_a_blend_of_one_is_the_folder_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    for name, path in (("folder", str(tiny_data)), ("blend", {tiny_data: 4})):
        assert train(path, tmp_path / name).returncode == 0
    assert helpers.losses(tmp_path / "folder") == helpers.losses(tmp_path / "blend")
    done = train({tiny_data: 1}, tmp_path / "folder", "--train.steps", "21")
    assert done.returncode == 0, done.stdout
    assert len(state(tmp_path / "folder", 21)["stages"]) == 1


def test_a_new_stage_on_demand(blended: Path, tiny_data: Path, other_data: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(blended, run)
    shutil.copytree(other_data, elsewhere)
    changed, longer = {tiny_data: 1, elsewhere: 1}, ("--train.steps", "25")
    done = train(changed, run, *longer)
    assert done.returncode == 2
    assert f"{tiny_data} had weight 3, has 1; put data.path back" in done.stdout
    done = train({tiny_data: 3, elsewhere: 1}, run, *longer)
    assert done.returncode == 0, done.stdout
    assert [stage["first_sample"] for stage in state(run, 25)["stages"]] == [0]
    new = ("--data.new_stage", "true")
    done = train(changed, run, *new, "--train.steps", "30", ranks=2)
    assert done.returncode == 0, done.stdout
    assert "stage 2 begins at sample 200" in done.stdout
    done = train(changed, run, *new, "--train.steps", "35")
    assert done.returncode == 0, done.stdout
    first, second = state(run, 35)["stages"]
    assert (first["first_sample"], second["first_sample"]) == (0, 200)
    assert [source["weight"] for source in second["sources"]] == [1, 1]
    drawn = [source["drawn"] for source in second["sources"]]
    assert sum(drawn) == 200 and 120 < drawn[0] < 180
    assert [source["path"] for source in second["sources"]] == [str(tiny_data), str(elsewhere)]
    assert [row[0] for row in helpers.samples(run)] == list(range(1, 36))


def test_evaluate_reads_the_validation_of_all_sources(
    blended: Path, tiny_data: Path, other_data: Path
) -> None:
    def tokens(*more: str) -> int:
        done = helpers.run([sys.executable, "-m", "hvdlm.evaluate", str(blended), *more])
        assert done.returncode == 0, done.stdout
        return int(json.loads(done.stdout.splitlines()[-1])["tokens"])

    alone = [tokens("--data.path", str(folder)) for folder in (tiny_data, other_data)]
    assert tokens() == sum(alone)


def test_what_cannot_be_blended_is_one_line_and_leaves_nothing(
    tiny_data: Path, other_data: Path, tmp_path: Path
) -> None:
    words = preprocess(other_data.parent, tmp_path / "words", "word")
    run = tmp_path / "run"
    for path, more, message in (
        ({tiny_data: 1, words: 1}, (), f"{words}: was made with tokenizer"),
        ({tiny_data: 1, tmp_path / "no": 1}, (), "no manifest.json, so no data set"),
        ({tiny_data: 1, f"{tiny_data}/": 1}, (), f"{tiny_data}: holds the same tokens as {tiny_data}; name"),
        (
            {tiny_data: 1, other_data: 30},
            ("--data.max_epochs", json.dumps({str(other_data): 1}), "--train.steps", "5000"),
            f"{other_data}: 5000 steps would read it",
        ),
        (
            str(tiny_data),
            ("--data.max_epochs", "1", "--train.steps", "5000"),
            "train.steps may be 105 at most",
        ),
    ):
        done = train(path, run, *more, ranks=2 if more else 1)
        lines = [line for line in done.stdout.splitlines() if "hvdlm train: error" in line]
        assert done.returncode == 2 and len(lines) == 1, done.stdout
        assert message in lines[0]
        assert "Traceback" not in done.stdout
        assert not run.exists()
