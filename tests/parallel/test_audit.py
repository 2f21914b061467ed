"""A run that was killed, resized and given a new stage consumed every sample once; damage is named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvdlm.data.loader import Loader
from hvdlm.run.audit import enumerate_draws, open_recorded, problem_of_run
from hvdlm.run.replay import replay, stage_of
from tests import helpers
from tests.parallel.test_train_blend import preprocess

KILLED_AFTER = 12


def audit(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return helpers.run([sys.executable, "-m", "hvdlm.audit", str(run), *more])


def found(run: Path, *more: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(audit(run, "--json", *more).stdout)
    return content


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"Once upon a time there were {i} ranks in a ring.\n" * 20)
    return preprocess(folder, folder / "shards", "byte")


@pytest.fixture(scope="module")
def run(tiny_data: Path, other_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed on 2 ranks; on 1 to its end; on 3 with another blend and micro-batch; on 2 from an older
    checkpoint, with the first micro-batch."""
    run = tmp_path_factory.mktemp("runs") / "run"

    def command(steps: int, *more: str) -> list[str]:
        return helpers.train_command(tiny_data, run, "--eval.every", "0", "--train.steps", str(steps), *more)

    with helpers.started([*helpers.mpirun(2), *command(100_000)], {}) as process:
        helpers.wait_for_step(run, KILLED_AFTER)
        helpers.send(helpers.ranks_of(process)[1], signal.SIGKILL)
        process.wait(timeout=60)
    begun = max(int(p.name.partition("-")[2]) for p in (run / "checkpoints").glob("step-????????"))
    blend = ("--data.path", json.dumps({str(tiny_data): 1, str(other_data): 2}), "--data.new_stage", "true")
    larger = (*blend, "--train.micro_batch", "4")
    for ranks, steps, more in ((1, 7, ()), (3, 20, larger), (2, 25, blend)):
        done = helpers.run([*helpers.mpirun(ranks), *command(begun + steps, *more)])
        assert done.returncode == 0, done.stdout
        if steps == 20:
            (run / f"checkpoints/step-{begun + 20:08}/state.json").unlink()
    return run


def test_a_killed_resized_and_changed_run_is_proven(run: Path, tiny_data: Path, other_data: Path) -> None:
    done = audit(run)
    assert done.returncode == 0, done.stdout
    assert "proven: every sample was consumed exactly once" in done.stdout
    result = found(run)
    assert [row["ranks"] for row in result["attempts"]] == [[2], [1], [3], [2]]
    assert [row["void"] for row in result["attempts"]][1:] == [0, 10, 0]
    assert result["stages"] == 2 and result["enumerated"]
    drawn = {source["path"]: source["drawn"] for source in result["sources"]}
    assert set(drawn) == {str(tiny_data), str(other_data)}
    assert sum(drawn.values()) == result["samples"] == 8 * result["steps"]


def lines(run: Path) -> list[str]:
    return (run / "ledger.jsonl").read_text().splitlines(keepends=True)


def removed(found: list[str]) -> list[str]:
    return found[:5] + found[6:]


def doubled(found: list[str]) -> list[str]:
    return found[:6] + found[5:]


def shifted(found: list[str]) -> list[str]:
    row = json.loads(found[5])
    row |= {"first_sample": row["first_sample"] + 1, "end_sample": row["end_sample"] + 1}
    return [*found[:5], json.dumps(row) + "\n", *found[6:]]


def repeated_samples(found: list[str]) -> list[str]:
    row = json.loads(found[5]) | {"first_sample": 0, "end_sample": 8}
    return [*found[:5], json.dumps(row) + "\n", *found[6:]]


def unopened(found: list[str]) -> list[str]:
    return [line for line in found if '{"attempt": 2' not in line]


def beheaded(found: list[str]) -> list[str]:
    return found[1:]


def opened_twice(found: list[str]) -> list[str]:
    return [found[0], *found]


def torn(found: list[str]) -> list[str]:
    return [*found[:-1], found[-1][:20]]


def torn_inside(found: list[str]) -> list[str]:
    return [*found[:5], found[5][:20] + "\n", *found[6:]]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (removed, "step 5 is missing between lines 5 and 6: gap"),
        (doubled, "line 7: step 5 is there twice: overlap"),
        (shifted, "line 6: step 5 has the samples [33, 41), needed [32, 40): gap"),
        (repeated_samples, "line 6: step 5 has the samples [0, 8), needed [32, 40): overlap"),
        (unopened, "a row of attempt 2, but no line before it opens that attempt"),
        (beheaded, "line 1: a row of attempt 1, but no line before it opens that attempt"),
        (opened_twice, "line 2 opens attempt 1 after 1"),
        (torn, "but a checkpoint has them: gap; line"),
        (torn_inside, "line 6 cannot be read"),
    ],
)
def test_damage_of_the_ledger_is_named(
    damage: Callable[[list[str]], list[str]], expected: str, run: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / "ledger.jsonl").write_text("".join(damage(lines(run))))
    done = audit(damaged)
    assert done.returncode == 1, done.stdout
    assert expected in done.stdout.splitlines()[-1]


def test_what_a_crash_leaves_after_the_checkpoint_is_no_damage(run: Path, tmp_path: Path) -> None:
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    steps = found(run)["steps"]
    row = {"step": steps + 1, "first_sample": 8 * steps, "end_sample": 8 * steps + 8}
    with (longer / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(row | {"world_size": 2, "attempt": 4}) + '\n{"step": ')
    result = found(longer)
    assert (result["proven"], result["steps"], result["steps_after"]) == (True, steps, 1)


def test_draws_that_a_stage_repeats_are_named(run: Path) -> None:
    recorded = open_recorded(run)
    assert problem_of_run(recorded) is None and enumerate_draws(recorded) is None
    first, second = recorded.stages
    back = replace(second.sources[0], drawn=second.sources[0].drawn - 3)
    wrong = replace(recorded, stages=(first, replace(second, sources=(back, *second.sources[1:]))))
    assert "stage 2" in (problem_of_run(wrong) or "") and "overlap" in (problem_of_run(wrong) or "")
    assert "a window comes twice in one epoch" in (enumerate_draws(wrong) or "")


def test_a_replayed_step_is_what_the_loader_gave(run: Path) -> None:
    recorded = open_recorded(run)
    last = recorded.checkpoint.step
    boundary = recorded.stages[1].first_sample // 8
    for step in (1, boundary, boundary + 1, last):
        stage = stage_of(recorded.stages, 8 * (step - 1))
        plan = replace(recorded.plan, micro_batch=4 if step == boundary + 1 else 2)
        seen = []
        for share in ((0, 3), (1, 3), (2, 3)):
            loader = Loader(
                recorded.sources_of(stage),
                "train",
                blend=stage.blend,
                plan=plan,
                share=share,
                prefetch_steps=0,
            )
            seen += next(iter(loader.steps(step - 1))).slots
        slots = replay(recorded, step)
        assert [(slot.slot, slot.rng_seed) for slot in slots] == [
            (slot.index, slot.rng_seed) for slot in seen
        ]
        for slot, given in zip(slots, seen, strict=True):
            assert [sample.ids[:-1] for sample in slot.samples] == given.batch["tokens"].tolist()
            assert [sample.ids[1:] for sample in slot.samples] == given.batch["labels"].tolist()


def test_a_replay_is_printed_and_data_may_have_moved(
    run: Path, tiny_data: Path, other_data: Path, tmp_path: Path
) -> None:
    last = str(found(run)["steps"])
    short, full = audit(run, "--replay", last), audit(run, "--replay", last, "--full")
    assert short.returncode == 0, short.stdout
    assert "slot 0, random seed" in short.stdout and "train-00000.h5 token" in short.stdout
    assert "\\n" in short.stdout and "\\n" not in full.stdout and "Once upon a" in full.stdout
    moved = tmp_path / "moved"
    shutil.copytree(other_data, moved)
    again = audit(run, "--replay", last, "--data.path", str(moved))
    assert f"{moved}/train-00000.h5" in again.stdout and str(other_data) not in again.stdout
    done = audit(run, "--replay", "100000")
    assert done.returncode == 2 and "has the steps 1 to" in done.stdout


def test_no_such_run_is_2(tmp_path: Path) -> None:
    done = audit(tmp_path / "no")
    assert done.returncode == 2 and "no such run folder" in done.stdout
    assert "Traceback" not in done.stdout
