"""The benchmark of document masks says what it compared; how fast is no matter here."""

from __future__ import annotations

import json

import pytest
import torch

from hvdlm.bench import mask
from hvdlm.bench.__main__ import main

SMALL = ["--rounds", "2", "--layers", "1", "--width", "64", "--seq-len", "32", "--micro-batch", "2"]


def test_every_length_of_documents_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "--json", *SMALL, "--document-tokens", "16", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in result["documents"]] == [16, 4]
    assert all(0 < row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in result["documents"])
    assert result["plain_ms"] > 0
    assert mask.table(result).count("\ndocuments of ") == 2


def test_quartiles_lie_between_what_was_measured() -> None:
    row = mask._row(4, [1.0, 1.0], [1.0, 9.0])
    assert 1 < row["quartiles"][0] < row["ratio"] == 5 < row["quartiles"][1] < 9


def test_the_masked_steps_see_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(mask, "_time", lambda model, ids, positions, precision: seen.append(positions) or 1.0)
    assert main(["mask", *SMALL, "--document-tokens", "4"]) == 0
    assert [positions is None for positions in seen] == [True, False] * 5
    assert (torch.stack(seen[1::2]) == 0).sum() > 5 * 2 * 2


def test_documents_have_the_length_that_was_asked_for() -> None:
    torch.manual_seed(0)
    positions = mask.packed_positions(64, 1000, 50)
    assert (positions[:, 0] == 0).all()
    begins = positions == 0
    assert torch.equal(positions[:, 1:][~begins[:, 1:]], positions[:, :-1][~begins[:, 1:]] + 1)
    assert 45 < positions.numel() / begins.sum() < 55


@pytest.mark.parametrize("flags", [["--rounds", "1"], ["--width", "100"], ["--document-tokens", "8", "0"]])
def test_an_option_out_of_range_is_named(flags: list[str]) -> None:
    with pytest.raises(mask.UserError, match=r"--rounds is 2 or more, --width a multiple of 64"):
        main(["mask", *SMALL, *flags])
