"""Stages: a run may change its blend, once it is told to, and then repeats and loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hvdlm.config import UserError
from hvdlm.data.blend import draws_of_samples
from hvdlm.run.folder import Start
from hvdlm.run.stages import Stage, StageSource, check_epochs, drawn_before, go_on, saved_stages

A, B, C = (StageSource(f"data/{name}", name * 64, 1) for name in "abc")
SEED = 5


def weighted(source: StageSource, weight: int, path: str = "") -> StageSource:
    return StageSource(path or source.path, source.fingerprint, weight)


def proceed(
    saved: tuple[Stage, ...], *sources: StageSource, sample: int, new_stage: bool = True
) -> tuple[Stage, ...]:
    return go_on(saved, sources, where=Path("run"), sample=sample, seed=SEED, new_stage=new_stage)


BEGUN = (Stage(0, (weighted(A, 3), weighted(B, 1))),)


def test_the_same_blend_goes_on_in_its_stage_wherever_it_lies() -> None:
    for new_stage in (False, True):
        moved = (weighted(A, 3, "elsewhere/a"), weighted(B, 1))
        stages = proceed(BEGUN, *moved, sample=5000, new_stage=new_stage)
        assert stages == (Stage(0, moved),)
        assert proceed(BEGUN, weighted(A, 6), weighted(B, 2), sample=5000, new_stage=new_stage) == BEGUN


@pytest.mark.parametrize(
    ("sources", "difference"),
    [
        ((weighted(A, 1), weighted(B, 1)), "data/a had weight 3, has 1;"),
        ((weighted(A, 3),), r"data/b \(fingerprint b{12}\) is gone;"),
        ((weighted(A, 3), weighted(B, 1), C), r"data/c \(fingerprint c{12}\) is new;"),
        ((weighted(B, 1), weighted(A, 3)), "its sources had another order;"),
        ((weighted(B, 2), weighted(A, 6)), "its sources had another order;"),
        ((weighted(A, 3), weighted(C, 1, "data/b")), r"data/b \(fingerprint c{12}\) is new, data/b .* gone;"),
    ],
)
def test_another_blend_is_refused_with_the_difference(sources: tuple, difference: str) -> None:
    with pytest.raises(
        UserError, match=f"^run: was trained on other data: {difference} put .*new_stage"
    ) as e:
        proceed(BEGUN, *sources, sample=5000, new_stage=False)
    assert e.value.exit_code == 2
    assert len(proceed(BEGUN, *sources, sample=5000)) == 2


def test_draws_are_carried_over_stages_by_fingerprint() -> None:
    """A source that pauses for a stage, and one that moves, go on where they were left."""
    stages = proceed(BEGUN, weighted(A, 1, "moved/a"), weighted(C, 2), sample=5001)
    stages = proceed(stages, weighted(B, 2), weighted(C, 1), weighted(A, 2), sample=12_345)
    assert [stage.first_sample for stage in stages] == [0, 5001, 12_345]
    edges, draws = [0, 5001, 12_345, 30_000], {key: np.zeros(0, np.int64) for key in "abc"}
    for stage, start, end in zip(stages, edges, edges[1:], strict=False):
        sources, numbers = draws_of_samples(np.arange(start, end), stage.blend, seed=SEED)
        for index, source in enumerate(stage.sources):
            key = source.fingerprint[0]
            assert source.drawn == len(draws[key])
            draws[key] = np.concatenate([draws[key], numbers[sources == index]])
    for key, numbers in draws.items():
        assert (numbers == np.arange(len(numbers))).all()
        assert drawn_before(stages, 30_000, seed=SEED)[key * 64] == len(numbers)
    assert sum(drawn_before(stages, 777, seed=SEED).values()) == 777
    assert sum(drawn_before(stages, 6000, seed=SEED).values()) == 6000


def test_a_folder_becomes_a_blend() -> None:
    stages = proceed((Stage(0, (A,)),), weighted(A, 2), weighted(B, 1), sample=5001)
    assert [source.drawn for source in stages[-1].sources] == [5001, 0]
    stages = proceed(stages, B, sample=6000)
    assert stages[-1].sources[0].drawn == drawn_before(stages, 6000, seed=SEED)["b" * 64] > 300


def test_stages_survive_json_and_older_checkpoints_mean_one() -> None:
    stages = proceed(BEGUN, C, sample=100)
    state = json.loads(json.dumps({"stages": [asdict(stage) for stage in stages]}))
    assert saved_stages(state) == stages
    assert Start.from_json(Start(2, "", 0, [], stages).to_json()).stages == stages
    older = {"config": {"data.path": "data/a"}, "fingerprints": {"data": "a" * 64}}
    assert saved_stages(older) == (Stage(0, (A,)),)


def test_reading_a_source_too_often_is_refused_with_the_most_steps() -> None:
    limits = [(1000, 0), (100, 2)]

    def check(stages: tuple[Stage, ...], steps: int) -> None:
        check_epochs(stages, limits, steps=steps, global_batch=8, seed=SEED)

    with pytest.raises(
        UserError, match=r"^data/b: 1000 steps would read it 20\.\d\d times, .* allows 2; "
    ) as e:
        check(BEGUN, 1000)
    most = int(str(e.value).partition("train.steps may be ")[2].partition(" ")[0])
    assert drawn_before(BEGUN, most * 8, seed=SEED)["b" * 64] <= 200
    assert drawn_before(BEGUN, most * 8 + 8, seed=SEED)["b" * 64] > 200
    check(BEGUN, most)
    with pytest.raises(UserError, match=f"may be {most} at most"):
        check(BEGUN, most + 1)
    later = proceed(BEGUN, weighted(A, 1), weighted(B, 1), sample=400)
    with pytest.raises(UserError, match=r"data/b: 100 steps would read it 3\.\d\d times.* may be 74 at most"):
        check(later, 100)


def test_the_most_steps_are_not_too_many_for_any_source() -> None:
    """Also where the stage that would read too much brings a source in."""
    begun = proceed((Stage(0, (A,)),), A, sample=720)
    stages = proceed(begun, weighted(A, 1), weighted(B, 1), sample=720)

    def check(steps: int) -> None:
        check_epochs(stages, [(1000, 2), (45, 1)], steps=steps, global_batch=8, seed=SEED)

    with pytest.raises(
        UserError, match=r"^data/b: 900 steps would read it .*; train.steps may be \d+ at"
    ) as e:
        check(900)
    most = int(str(e.value).partition("train.steps may be ")[2].partition(" ")[0])
    check(most)
    with pytest.raises(UserError, match=f"^data/b: .* may be {most} at most"):
        check(most + 1)
