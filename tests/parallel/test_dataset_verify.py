"""`dataset verify` on real ranks: one verdict, printed once, and one exit code for all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hvdlm.data.manifest import read_manifest
from hvdlm.dataset.__main__ import main as dataset
from tests import helpers

EACH_CODE = 'python="$0"; "$python" -m hvdlm.dataset "$@"; echo "rank code $?"'
"""mpirun ends the others when one rank's code is not 0, so each tells its own."""


def on_ranks(count: int, *arguments: str) -> list[str]:
    """What the ranks print."""
    done = helpers.run([*helpers.mpirun(count), "sh", "-c", EACH_CODE, sys.executable, *arguments])
    return done.stdout.splitlines()


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
    """A data set with a flipped bit in the tokens of every shard but one."""
    ids = np.random.default_rng(0).integers(0, 256, 6000).astype("<u2")
    ids[99::100] = 256
    ids.tofile(tmp_path / "ids.bin")
    folder = tmp_path / "data"
    command = ["import", str(tmp_path / "ids.bin"), "--format", "nanogpt", "--out", str(folder)]
    command += ["--tokenizer", str(tiny_data / "tokenizer.json"), "--shard-tokens", "1000"]
    assert dataset([*command, "--val-fraction", "0.3"]) == 0
    for entry in read_manifest(folder).shards[1:]:
        content = bytearray((folder / entry.name).read_bytes())
        content[entry.extents.tokens.offset + 5] ^= 4
        (folder / entry.name).write_bytes(content)
    return folder


def test_ranks_share_the_work_and_agree_on_the_verdict(damaged: Path) -> None:
    shards = read_manifest(damaged).shards
    assert len(shards) > 5
    lines = on_ranks(3, "verify", str(damaged))
    assert [line for line in lines if line.startswith("rank")] == ["rank code 1"] * 3
    *problems, total = [line for line in lines if not line.startswith("rank")]
    assert [line.partition(": ")[0] for line in problems] == [f"{damaged / e.name}" for e in shards[1:]]
    assert all(": bad: block 0: tokens 0 to " in line for line in problems)
    assert total.startswith(f"{damaged}: {len(shards)} shards, ")
    assert total.endswith(f": {len(shards) - 1} bad")


def test_an_intact_data_set_is_one_line_and_0_for_all(tiny_data: Path) -> None:
    lines = on_ranks(2, "verify", str(tiny_data), "--workers", "1")
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank code 0"] * 2
    (total,) = [line for line in lines if not line.startswith("rank")]
    assert total.endswith(": all intact")


def test_what_all_ranks_cannot_do_is_one_line_and_2_for_all(tmp_path: Path) -> None:
    for action, said in (("verify", "no manifest.json, so no data set"), ("inspect", "runs in one process")):
        lines = on_ranks(2, action, str(tmp_path))
        assert [line for line in lines if line.startswith("rank")] == ["rank code 2"] * 2
        (error,) = [line for line in lines if not line.startswith("rank")]
        assert error.startswith("hvdlm dataset: error: ")
        assert said in error
