"""Training with `data.document_mask`: on any number of ranks, over a resume, and in evaluate."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import pytest
import torch

from hvdlm.run.restore import open_checkpoint
from hvdlm.run.trained import open_trained
from tests import helpers

MASKED = ("--data.document_mask", "true", "--optim.schedule", "constant", "--eval.batches", "4")


@pytest.fixture(scope="module")
def lines(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some 40 tokens, so that windows of 32 begin in one and end in the next."""
    out = tmp_path_factory.mktemp("lines") / "shards"
    command = [sys.executable, "-m", "hvdlm.preprocess", str(tiny_data.parent / "texts"), "--out", str(out)]
    command += ["--document", "line", "--tokenizer", "byte", "--val-fraction", "0.2", "--workers", "1"]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    return out


def train(data: Path, run_folder: Path, *more: str, ranks: int = 1) -> Path:
    launcher = helpers.mpirun(ranks) if ranks > 1 else []
    done = helpers.run([*launcher, *helpers.train_command(data, run_folder, *MASKED, *more)])
    assert done.returncode == 0, done.stdout
    return run_folder


@pytest.fixture(scope="module")
def masked(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(lines, tmp_path_factory.mktemp("runs") / "masked")


def test_the_mask_changes_the_losses_and_not_the_samples(lines: Path, masked: Path, tmp_path: Path) -> None:
    plain = train(lines, tmp_path / "plain", "--data.document_mask", "false")
    assert helpers.samples(masked) == helpers.samples(plain)
    found, other = helpers.losses(masked), helpers.losses(plain)
    assert found.keys() == other.keys() == set(range(1, 21))
    assert all(found[step] != other[step] for step in found)


def test_two_ranks_follow_the_same_curve(lines: Path, masked: Path, tmp_path: Path) -> None:
    pair = train(lines, tmp_path / "pair", ranks=2)
    assert helpers.samples(pair) == helpers.samples(masked)
    assert helpers.losses(pair) == pytest.approx(helpers.losses(masked), rel=1e-4)
    validation, expected = (helpers.rows(run, "metrics.jsonl", kind="eval") for run in (pair, masked))
    assert len(expected) == 3
    for row, other in zip(validation, expected, strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)


def test_a_resumed_run_is_bit_equal_and_keeps_its_mask(lines: Path, masked: Path, tmp_path: Path) -> None:
    run_folder = train(lines, tmp_path / "run", "--train.steps", "10")
    command = helpers.train_command(lines, run_folder, *MASKED)
    refused = helpers.run([*command, "--data.document_mask", "false"])
    assert refused.returncode == 2
    assert "data.document_mask was True, is False" in refused.stdout
    train(lines, run_folder)
    assert helpers.losses(run_folder) == helpers.losses(masked)


def test_evaluate_takes_the_mask_of_the_run(lines: Path, masked: Path) -> None:
    """The loss it gives is that of every document's part of every window, each run alone."""
    done = helpers.run([sys.executable, "-m", "hvdlm.evaluate", str(masked), "--data.path", str(lines)])
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    model = open_trained(open_checkpoint(masked)).model
    loss_sum, labels = 0.0, 0
    with h5py.File(lines / "val-00000.h5") as file:
        tokens = torch.from_numpy(file["tokens"][:].astype("int64"))
        offsets = file["doc_offsets"][:].tolist()
    cuts = sorted({*offsets[:-1], *range(0, len(tokens) - 1, 32), len(tokens) - 1})
    for first, end in pairwise(cuts):
        with torch.inference_mode():
            part, count = model.loss(tokens[None, first:end], tokens[None, first + 1 : end + 1])
        loss_sum, labels = loss_sum + float(part), labels + int(count)
    assert found["tokens"] == labels == len(tokens) - 1
    assert found["loss"] == pytest.approx(loss_sum / labels, rel=1e-5)
