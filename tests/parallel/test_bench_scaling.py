"""The benchmark runs and says what it compared; no test depends on speed."""

import json

import pytest

from hvdlm.bench import scaling
from hvdlm.bench.__main__ import main
from hvdlm.corpus import stdlib


def test_one_rank_and_two_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = stdlib.find()[::20]
    monkeypatch.setattr(stdlib, "find", lambda: some)
    assert main(["scaling", "--mb", "1", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [*result["seconds"]] == ["1", "2"]
    assert result["times"] == result["seconds"]["1"] / result["seconds"]["2"] > 0
    assert 1 <= result["text_mb"] < 2
    assert scaling.table(result).endswith("times as fast as one")
