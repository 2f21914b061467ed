"""The real command with compiled blocks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import helpers

COMPILED = ("--model.compile", "true")


def saved_names(run_folder: Path) -> set[str]:
    names: set[str] = set()
    for file in (run_folder / "checkpoints/step-00000020").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def test_compiled_blocks_follow_the_same_curve_and_may_come_and_go(tiny_data: Path, tmp_path: Path) -> None:
    """On two ranks from step 11 on, with checkpointed activations; the result is evaluated without."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert helpers.run(helpers.train_command(tiny_data, plain)).returncode == 0
    shutil.copytree(plain, run)
    shutil.rmtree(run / "checkpoints/step-00000020")
    more = (*COMPILED, "--model.checkpoint_activations", "true")
    cache = tmp_path / "cache"
    command = [*helpers.mpirun(2), *helpers.train_command(tiny_data, run, *more)]
    done = helpers.run(command, env={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stdout
    assert list(cache.rglob("*.so"))
    assert len(helpers.rows(run, "metrics.jsonl", kind="train", step=20)) == 2
    assert helpers.losses(run) == pytest.approx(helpers.losses(plain), rel=1e-4)
    assert saved_names(run) == saved_names(plain)
    assert helpers.run([sys.executable, "-m", "hvdlm.evaluate", str(run)]).returncode == 0


def test_without_a_compiler_the_command_says_so(tiny_data: Path, tmp_path: Path) -> None:
    command = helpers.train_command(tiny_data, tmp_path / "run", *COMPILED)
    done = helpers.run(command, env={"CXX": "nowhere"})
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "needs a C++ compiler" in errors[0] and "Traceback" not in done.stdout
