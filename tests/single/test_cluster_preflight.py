"""What preflight makes of answers; of real nodes: tests/cluster."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdlm.cluster import exclude
from hvdlm.cluster.preflight import compare, facts, folder
from hvdlm.cluster.preflight.compare import Limits, NodeFinding
from hvdlm.cluster.preflight.fabric import ANSWER, tournament
from hvdlm.cluster.preflight.groups import answers
from hvdlm.cluster.preflight.line import Answer
from hvdlm.config import UserError


def named(found: list[NodeFinding]) -> list[str]:
    return [one.node for one in found if one.finding.state == "fail"]


def test_most_nodes_are_believed_and_of_equally_many_the_first() -> None:
    assert compare.odd_ones_out({"a": 1, "b": 2, "c": 2}) == (2, ["a"])
    assert compare.odd_ones_out({"a": 1, "b": 2}) == (1, ["b"])


@pytest.mark.parametrize("between", ["\n", "\r\n", "", " noise\nnoise "])
def test_ranks_that_share_a_line_are_both_heard(between: str) -> None:
    one, other = ({"node": node, "right": True} for node in "ab")
    output = f"noise {ANSWER} {json.dumps(one)}{between}{ANSWER} {json.dumps(other)}\n\n"
    assert answers(output) == {"a": one, "b": other}
    assert answers(output[:-5]) == {"a": one}


def test_two_nodes_of_one_host_name_are_both_named() -> None:
    found = compare.hosts({"a": {"host": "x"}, "b": {"host": "y"}, "c": {"host": "x"}})
    assert named(found) == ["a", "c"]


@pytest.mark.parametrize(
    ("answers", "bad"),
    [
        ([(100.0, 105.0, 100.1)], True),
        ([(100.0, 101.5, 100.1)], False),
        # The exchange took ten seconds: where in them it was answered nobody knows.
        ([(100.0, 109.9, 110.0)], False),
        ([(100.0, 109.9, 110.0), (120.0, 125.0, 120.1)], True),
        ([(100.0, 90.0, 100.1)], True),
    ],
)
def test_a_clock_is_off_where_no_delay_explains_it(
    answers: list[tuple[float, float, float]], bad: bool
) -> None:
    rounds = [
        {"a": Answer({"unix": clock}, sent_unix=sent, received_unix=got)} for sent, clock, got in answers
    ]
    assert named(compare.clocks(rounds, Limits(skew_s=2.0))) == (["a"] if bad else [])


def gpu(name: str = "H100", errors: str = "0") -> dict[str, str]:
    return {"name": name, "driver": "570.1", "errors": errors}


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ([gpu(), gpu()], ""),
        ([gpu(), gpu(errors="[N/A]")], ""),
        ([gpu()], "1 x H100 (driver 570.1)"),
        ([gpu(), gpu("A100")], "1 x H100 (driver 570.1), 1 x A100 (driver 570.1)"),
        ([gpu(), gpu(errors="3")], "GPU 1: 3 uncorrectable ECC errors"),
    ],
)
def test_gpus_are_as_many_of_a_kind_and_sound(last: list[dict[str, str]], found: str) -> None:
    values: dict[str, Any] = {name: {"gpus": [gpu(), gpu()], "trouble_found": ""} for name in "ab"}
    values["c"] = {"gpus": last, "trouble_found": ""}
    bad = compare.gpus(values)
    assert named(bad) == (["c"] if found else [])
    assert [one.finding.found for one in bad] == ([found] if found else [])


def test_a_driver_that_hangs_is_named() -> None:
    values = {
        "a": {"gpus": [gpu()], "trouble_found": ""},
        "b": {"gpus": [], "trouble_found": "nvidia-smi: no end within 20 s"},
    }
    assert named(compare.gpus(values)) == ["b"]


def make_port(devices: Path, name: str, state: str, rate: str = "400 Gb/sec (4X NDR)") -> None:
    port = devices / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")


def test_a_port_that_is_down_or_slow_on_one_node_is_named(tmp_path: Path) -> None:
    """mlx5_1 is down everywhere: nobody uses it."""
    for node, state, rate in (
        ("a", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("b", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("down", "1: DOWN", "10 Gb/sec (4X SDR)"),
        ("slow", "4: ACTIVE", "100 Gb/sec (1X NDR)"),
    ):
        make_port(tmp_path / node, "mlx5_0", state, rate)
        make_port(tmp_path / node, "mlx5_1", "1: DOWN")
    values = {path.name: facts.links(str(path)) for path in sorted(tmp_path.iterdir())}
    found = compare.links(values)
    assert named(found) == ["down", "slow"]
    assert found[0].finding.found == "no active port"
    assert found[0].finding.needed == "mlx5_0/1 at 400 Gb/sec (4X NDR)"


def test_memory_has_to_be_lockable_where_there_is_a_fabric() -> None:
    values = {
        "a": {"bytes": -1, "fabric": True},
        "b": {"bytes": 65536, "fabric": True},
        "c": {"bytes": 65536, "fabric": False},
    }
    assert named(compare.memlock(values)) == ["b"]


def test_space_and_inodes_run_out_apart() -> None:
    free = {"bytes": 2**40, "inodes": -1}
    values = {
        "a": {"folders": {"/run": free}},
        "b": {"folders": {"/run": {"bytes": 2**30, "inodes": 10**6}}},
        "c": {"folders": {"/run": {"bytes": 2**40, "inodes": 3}}},
    }
    found = compare.space(values, Limits(free_gib=5))
    assert [(one.node, one.finding.name) for one in found] == [("b", "free space"), ("c", "free inodes")]


@pytest.mark.parametrize(("apart", "bad"), [("", []), ("c", ["c"]), ("a", ["a"]), ("cd", ["c", "d"])])
def test_who_sees_another_folder_is_named(apart: str, bad: list[str]) -> None:
    """Each of those has a folder of its own."""
    nodes = list("abcdefgh")
    wanted = {node: compare.neighbors(node, nodes) for node in nodes}
    values = {
        node: {"missing": [other for other in wanted[node] if node in apart or other in apart]}
        for node in nodes
    }
    assert named(compare.folder(values, wanted)) == bad


def test_of_two_nodes_with_two_folders_the_first_is_believed() -> None:
    values = {"a": {"missing": ["b"]}, "b": {"missing": ["a"]}}
    assert named(compare.folder(values, {"a": ["b"], "b": ["a"]})) == ["b"]


def test_slow_is_far_below_the_median() -> None:
    limits = Limits(slow=0.5)
    assert named(compare.slow_ones("x", {"a": 10, "b": 9, "c": 4, "d": 11}, "u", limits=limits)) == ["c"]
    assert named(compare.slow_ones("x", {"a": 10, "b": 2}, "u", limits=limits)) == ["b"]
    assert compare.slow_ones("x", {"a": 10, "b": 6}, "u", limits=limits) == []
    assert compare.slow_ones("x", {"a": 10, "b": 1}, "u", limits=Limits(slow=0)) == []


def test_who_is_slow_with_every_partner_is_slow_itself() -> None:
    """c's cable is bad: each of its pairs is slow, and its partners have others."""
    ranks: dict[str, dict[str, Any]] = {name: {"gib_s": 1.0, "pairs": {}} for name in "abcd"}
    for first, second in itertools.combinations("abcd", 2):
        speed = 1.0 if "c" in (first, second) else 10.0
        ranks[first]["pairs"][second] = ranks[second]["pairs"][first] = speed
    assert named(compare.sums(ranks, Limits())) == ["c"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 33])
def test_each_rank_meets_up_to_three_others_one_at_a_time(ranks: int) -> None:
    met: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    for pairs in tournament(ranks):
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
        for first, second in pairs:
            assert 0 <= first < second < ranks
            met[first].append(second)
            met[second].append(first)
    for partners in met.values():
        assert len(partners) == len(set(partners))
        assert min(ranks - 1, 2) <= len(partners) <= 3


def test_a_node_answers_until_its_stdin_ends_whatever_it_is_asked(tmp_path: Path) -> None:
    here = str(tmp_path / "run")
    questions = [
        {"question": "clock"},
        {"question": "space", "folders": [str(tmp_path / "missing")]},
        {"question": "riddle"},
        {"question": "write", "folder": here, "name": "n1", "text": "x"},
        {
            "question": "read",
            "folder": str(tmp_path / "run"),
            "names": ["n1", "n2"],
            "text": "x",
            "wait_s": 0,
        },
        {"question": "config", "arguments": ["--train.stepps", "3"]},
        {"question": "config", "arguments": ["--train.steps", "3"]},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "hvdlm.slurm", "preflight", "--part", "node"],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    clock, space, riddle, _, read, wrong, right = map(json.loads, done.stdout.splitlines())
    assert clock["unix"] > 1e9
    assert space == {"trouble": f"No such file or directory: {tmp_path}/missing"}
    assert riddle == {"trouble": "KeyError: 'riddle'"}
    assert read == {"missing": ["n2"]}
    assert "did you mean train.steps?" in wrong["trouble"]
    assert len(right["config"]) == 16


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    write = f"sleep 0.5; echo -n x > {tmp_path}/n2"
    with subprocess.Popen(["sh", "-c", write]):
        assert folder.read(str(tmp_path), ["n2"], text="x", wait_s=20) == {"missing": []}


def test_too_many_nodes_are_no_fault_of_theirs(tmp_path: Path) -> None:
    (tmp_path / "excluded.json").write_text('["n1", "n2"]')
    with pytest.raises(UserError, match=r"found 2 node\(s\) left out before, and now n3; needed at most 2"):
        exclude.exclude(["n3"], tmp_path, {"SLURM_JOB_NAME": "x"}, most=2)


def test_outside_a_job_it_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvdlm.slurm", "preflight"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "hvdlm slurm: error: preflight: found no Slurm job, needed one; start it in a batch script or salloc"
    ]
