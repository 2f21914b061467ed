"""Traces that a run writes on demand: the profile of a few steps of each rank, and Horovod's timeline."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import helpers

GLOO = ["horovodrun", "--gloo", "-np", "2"]


def events(path: Path) -> list[dict[str, Any]]:
    """Of a Chrome trace, either an object or a bare array."""
    trace = json.loads(path.read_text())
    found = trace["traceEvents"] if isinstance(trace, dict) else trace
    return [event for event in found if event]


def phases(path: Path) -> Counter[str]:
    """How often each named range of ours is in a profile."""
    names = (event["name"] for event in events(path) if event.get("cat") == "user_annotation")
    return Counter(name for name in names if name.startswith("hvdlm."))


def sent(found: list[dict[str, Any]]) -> Counter[str]:
    """How often Horovod summed or gathered each tensor, by its name, in a timeline."""
    names, counts = {}, Counter[str]()
    for event in found:
        if event.get("name") == "process_name" and "name" in event["args"]:
            names[event["pid"]] = event["args"]["name"]
        if event.get("name") in ("ALLREDUCE", "ALLGATHER"):
            counts[names[event["pid"]]] += 1
    return counts


def complete_events(text: str) -> list[dict[str, Any]]:
    """Those of an array that may be cut off anywhere, as Perfetto reads it."""
    found, rest, decoder = [], text.strip()[1:], json.JSONDecoder()
    with contextlib.suppress(json.JSONDecodeError):
        while rest := rest.lstrip(",\n ]"):
            event, end = decoder.raw_decode(rest)
            found.append(event)
            rest = rest[end:]
    return found


def test_every_rank_profiles_the_steps_from_the_third(tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--log.profile", "3", "--checkpoint.every", "4", "--eval.every", "5", "--train.steps", "8"]
    done = helpers.run([*helpers.mpirun(2), *helpers.train_command(tiny_data, tmp_path / "run", *flags)])
    assert done.returncode == 0, done.stdout
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["1.0.json", "1.1.json"]
    for path in folder.iterdir():
        expected = {"hvdlm.load": 3, "hvdlm.step": 3, "hvdlm.save": 1, "hvdlm.validate": 1}
        assert phases(path) == expected, path
        assert any(event.get("name") == "aten::mm" for event in events(path))
    assert f"profile of steps 3 to 5: {folder}" in done.stdout
    assert "https://ui.perfetto.dev" in done.stdout


def test_a_profile_ends_with_the_run_and_each_attempt_has_its_own(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    for steps, said in ((4, "steps 3 to 4"), (8, "steps 7 to 8"), (9, "step 9 is the last: no trace")):
        flags = ["--log.profile", "5", "--train.steps", str(steps), "--optim.schedule", "constant"]
        done = helpers.run(helpers.train_command(tiny_data, run_folder, *flags))
        assert done.returncode == 0, done.stdout
        assert said in done.stdout
    assert sorted(path.name for path in (run_folder / "profile").iterdir()) == ["1.0.json", "2.0.json"]
    assert [phases(run_folder / "profile" / f"{n}.0.json")["hvdlm.step"] for n in (1, 2)] == [2, 2]


@pytest.mark.parametrize("launcher", [helpers.mpirun(2), GLOO], ids=["mpirun", "gloo"])
def test_the_timeline_has_every_sum_to_the_last(launcher: list[str], tiny_data: Path, tmp_path: Path) -> None:
    command = helpers.train_command(tiny_data, tmp_path / "run", "--log.timeline", "true")
    done = helpers.run([*launcher, *command])
    assert done.returncode == 0, done.stdout
    path = tmp_path / "run" / "timeline-1.json"
    assert f"timeline: {path}" in done.stdout
    counts = sent(events(path))
    assert counts["allreduce.step.statistics"] == 20
    assert counts["grouped_allreduce.grad.norm.weight_1of11"] == 20
    # The last that a run sends.
    assert counts["allgather.finish.told"] == 1


def test_a_killed_run_leaves_a_timeline_that_can_be_read(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    flags = ["--log.timeline", "true", "--train.steps", "100000"]
    command = [*helpers.mpirun(2), *helpers.train_command(tiny_data, run_folder, *flags)]
    with helpers.started(command, {}) as process:
        helpers.wait_for_step(run_folder, 20)
        for rank in helpers.ranks_of(process).values():
            helpers.send(rank, signal.SIGKILL)
        process.wait(60)
    found = complete_events((run_folder / "timeline-1.json").read_text())
    assert sent(found)["allreduce.step.statistics"] >= 10


def test_one_process_has_no_timeline(tiny_data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    done = helpers.run(helpers.train_command(tiny_data, run_folder, "--log.timeline", "true"))
    assert done.returncode == 0, done.stdout
    assert "one process sends nothing" in done.stdout
    assert not list(run_folder.glob("timeline-*"))
