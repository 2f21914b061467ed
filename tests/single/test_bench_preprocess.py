"""The benchmark runs and says what it compared; no test depends on speed."""

import json

import pytest

from hvdlm.bench import preprocess
from hvdlm.bench.__main__ import main


def test_every_way_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "VOCAB_SIZES", (300, 400))
    assert main(["preprocess", "--rounds", "1", "--mb", "0.2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["vocab_size"] for one in result["tokenizers"]] == [300, 400]
    for one in result["tokenizers"]:
        assert one["encoder"] == "gigatoken"
        names = ["hugging_face", "bare", "end_to_end", "fast_bare", "fast_end_to_end"]
        assert list(one["mb_per_s"]) == list(one["times_hugging_face"]) == names
        assert list(one["times_bare"]) == ["end_to_end", "fast_end_to_end"]
        assert all(value > 0 for value in one["mb_per_s"].values())
    assert preprocess.table(result).count("of the bare tokenizer") == 4
    assert list(result["versions"]) == ["tokenizers", "gigatoken", "numpy"]
