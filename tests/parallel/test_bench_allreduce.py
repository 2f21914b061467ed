"""The benchmark of sums over ranks, under real launchers; how fast they are is no matter here."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from typing import Any

import pytest
import torch

from hvdlm.bench import allreduce
from hvdlm.comm.world import World
from tests import helpers

COMMAND = [sys.executable, "-m", "hvdlm.bench", "allreduce", "--max-mb", "4", "--rounds", "1"]
GLOO = ["horovodrun", "--gloo", "-np", "2"]


@pytest.mark.parametrize(
    ("launcher", "plane", "libraries"),
    [
        (helpers.mpirun(2), "MPI", ["horovod", "mpi", "torch"]),
        (helpers.mpirun(3), "MPI", ["horovod", "mpi", "torch"]),
        (GLOO, "Gloo", ["horovod", "torch"]),
    ],
    ids=["mpirun-2", "mpirun-3", "gloo-2"],
)
def test_it_reports_what_it_timed(launcher: list[str], plane: str, libraries: list[str]) -> None:
    done = helpers.run([*launcher, *COMMAND, "--json"])
    assert done.returncode == 0, done.stdout
    (line,) = re.findall(r"\{.*\}$", done.stdout, re.MULTILINE)
    result = json.loads(line)
    ranks = int(launcher[launcher.index("-np") + 1])
    assert (result["ranks"], result["plane"], result["libraries"]) == (ranks, plane, libraries)
    assert (result["fusion_bytes"], result["cycle_ms"], result["device"]) == (0, 2.0, "cpu")
    assert [row["bytes"] for row in result["sizes"]] == [4096 * 4**k for k in range(6)]
    for row in result["sizes"]:
        for name in libraries:
            assert row["gb_per_s"][name] == pytest.approx(row["bytes"] / row["us"][name] / 1000)
            assert row["bus_gb_per_s"][name] == pytest.approx(
                row["gb_per_s"][name] * {2: 1.0, 3: 4 / 3}[ranks]
            )
    assert result["latency_us"] == result["sizes"][0]["us"]
    check_buckets(result)


def check_buckets(result: dict[str, Any]) -> None:
    ms = {int(mb): one for mb, one in result["buckets"].items()}
    assert list(ms) == [1, 2, 4]
    best = result["best_mb"]
    assert ms[best] <= 1.05 * min(ms.values())
    assert all(ms[mb] > 1.05 * min(ms.values()) for mb in ms if mb < best)
    assert tomllib.loads(result["toml"]) == {"parallel": {"bucket_mb": best, "fusion_mb": best}}


def test_only_the_first_rank_prints_a_table() -> None:
    done = helpers.run([*helpers.mpirun(2), *COMMAND])
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("[parallel]") == done.stdout.count("2 ranks (mpi) on cpu") == 1


def test_all_leave_with_one_line_where_an_option_is_bad() -> None:
    done = helpers.run([*helpers.mpirun(2), *COMMAND, "--rounds", "0"])
    assert done.returncode == 2
    assert done.stdout.count("hvdlm bench: error: bench allreduce: --max-mb 4 and --rounds 0 must be") == 1


def test_one_process_is_told_the_command() -> None:
    done = helpers.run(COMMAND)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "one process has nobody to sum with" in done.stdout
    assert "mpirun -np 2 --bind-to none python -m hvdlm.bench allreduce" in done.stdout


@pytest.mark.ranks(2)
def test_a_wrong_sum_is_found(world: World) -> None:
    message = allreduce.Message("m", 2, 8192, together=True)
    memory = torch.empty(4096)

    def forgets_the_last(tensors: list[torch.Tensor], name: str) -> None:
        for values in tensors[: max(1, len(tensors) - 1)]:
            world.sum_(values, name=name)

    with pytest.raises(RuntimeError, match="forgetful: 2 x 8192 bytes: a sum is wrong"):
        allreduce._time(message, "forgetful", forgets_the_last, memory, world)
