"""What the saving's benchmark makes of its times; how fast is no matter here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from hvdlm.bench.save import Pacer, Timed, _dd_mb_s, _summary, table
from hvdlm.config import UserError


def pacer(tmp_path: Path, timed: list[Timed]) -> Pacer:
    found = Pacer(cast(Any, None), cast(Any, None), tmp_path, every=5)
    found.timed, found.dd_mb_s = timed, [200.0]
    return found


def row(step: int) -> dict[str, Any]:
    times = {"snapshot_s": 0.1, "write_s": 2.0, "commit_s": 0.01, "stall_s": 0.0}
    return {"step": step, "bytes": 300_000_000, **times}


def test_steps_beside_a_save_are_compared_with_the_others(tmp_path: Path) -> None:
    seconds = {5: 1.5, 6: 1.1, 7: 1.0, 8: 0.9, 9: 1.1}
    result = _summary(pacer(tmp_path, [Timed(s, t, s < 7) for s, t in seconds.items()]), [row(5)], 5)
    assert result["saving"] == pytest.approx(1.3)
    assert result["worst"] == pytest.approx(1.5)
    assert (result["save_mb_s"], result["dd_mb_s"], result["write"]) == (150, 200, 0.75)
    assert "1.300 of another step, the worst of them 1.500" in table(result)


def test_saves_without_a_pause_are_no_comparison(tmp_path: Path) -> None:
    timed = [Timed(step, 1.0, step < 9) for step in range(5, 10)]
    with pytest.raises(UserError, match=r"a save takes 4 steps; raise --every 5"):
        _summary(pacer(tmp_path, timed), [row(5)], 5)


def test_dd_leaves_nothing(tmp_path: Path) -> None:
    assert _dd_mb_s(tmp_path, 2**23) > 0
    assert list(tmp_path.iterdir()) == []
