"""Preflight on a real Slurm of four nodes, some of which are bad."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch
import pytest

from hvdlm.config import RunConfig
from hvdlm.config.parse import to_toml
from tests import helpers
from tests.cluster import batch_site, jobs
from tests.cluster.batch_site import write_site
from tests.cluster.one_machine import Machine

pytestmark = pytest.mark.usefixtures("slurm")

PACKAGE = jobs.ROOT / "hvdlm"
CALM = ("--slow", "0.2", "--free-gib", "0.1")
"""Four nodes on two cores, which others use too: noise is no fault."""


def preflight(folder: Path, *options: str, job: tuple[str, ...] = (), before: str = "") -> tuple[str, str]:
    """Hand in a job of four nodes with two tasks each that does nothing else; its number and its log."""
    command = " ".join(
        ["python -m hvdlm.slurm preflight", *CALM, *options, "--train.out", str(folder / "run")]
    )
    log = folder / "log"
    shape = ("--nodes=4", "--ntasks-per-node=2", f"--output={log}")
    number = jobs.submit(*shape, *job, f"--wrap={before}{command}")
    return number, str(log)


def ended(number: str, log: str) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    jobs.wait_for_end(number, within_s=150)
    (code,) = jobs.exit_codes(number)
    return int(code), Path(log).read_text()


def failures(folder: Path, number: str) -> set[tuple[str, str]]:
    """(node, check) of what the report says has failed."""
    report: dict[str, Any] = json.loads((folder / "run" / "preflight" / f"{number}.json").read_text())
    assert report["job"] == number
    assert report["nodes"] == ["n1", "n2", "n3", "n4"]
    failed = {(one["node"], one["name"]) for one in report["findings"] if one["state"] == "fail"}
    assert set(report["bad"]) == {node for node, _ in failed if node}
    assert report["ok"] == (not failed)
    return failed


@contextlib.contextmanager
def slow_network(slurm: Machine, node: str) -> Iterator[None]:
    """All that a node sends goes through a bottleneck of 10 Mbit/s."""
    if not slurm.own_network:
        pytest.skip("the nodes share one network")
    tc = [*slurm.inside(node), "tc", "qdisc"]
    bottleneck = "tbf rate 10mbit burst 64kb latency 400ms".split()
    subprocess.run([*tc, "add", "dev", "eth0", "root", *bottleneck], check=True)
    try:
        yield
    finally:
        subprocess.run([*tc, "del", "dev", "eth0", "root"], check=True)


@pytest.mark.parametrize(
    "mpi",
    ["none", pytest.param("pmix", marks=pytest.mark.long), pytest.param("mpirun", marks=pytest.mark.long)],
)
def test_good_nodes_are_good(mpi: str, tmp_path: Path) -> None:
    number, log = preflight(tmp_path, "--json", "--mpi", mpi, "--")
    code, output = ended(number, log)
    assert code == 0, output
    report = json.loads(output)
    assert failures(tmp_path, number) == set()
    states = {one["name"]: one["state"] for one in report["findings"]}
    assert {*states} >= {"hello", "clock", "run folder", "software", "config", "space", "memlock", "score"}
    assert states["all-reduce"] == "ok"
    assert "right on 4 nodes" in output
    assert [path.name for path in (tmp_path / "run" / "preflight").iterdir()] == [f"{number}.json"]


def test_what_differs_on_one_node_is_named_with_it(slurm: Machine, tmp_path: Path) -> None:
    """Another package and clock on n2, another run folder on n3, another configuration on n4."""
    package, other_folder, other_config = tmp_path / "package", tmp_path / "other", tmp_path / "other.toml"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    facts = package / "cluster" / "preflight" / "facts.py"
    facts.write_text(facts.read_text().replace('"unix": time.time()', '"unix": time.time() + 5'))
    other_folder.mkdir()
    (tmp_path / "run").mkdir()
    config = tmp_path / "mine.toml"
    config.write_text(to_toml(RunConfig()))
    other_config.write_text(config.read_text().replace("seed = ", "seed = 1"))
    with (
        slurm.mounted("n2", package, PACKAGE),
        slurm.mounted("n3", other_folder, tmp_path / "run"),
        slurm.mounted("n4", other_config, config),
    ):
        number, log = preflight(tmp_path, "--mpi off", "--", "--config", str(config))
        code, output = ended(number, log)
    assert code == 1, output
    named = {("n2", "code"), ("n2", "clock"), ("n3", "run folder"), ("n4", "config")}
    assert failures(tmp_path, number) == named
    assert "preflight: bad nodes: n2,n3,n4" in output
    assert "5.0 s ahead" in output


def test_a_run_folder_that_one_node_may_not_write(slurm: Machine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    there = ["nsenter", f"--target={slurm.first('n4').pid}", "--mount", "--pid", "mount"]
    with slurm.mounted("n4", tmp_path / "run", tmp_path / "run"):
        subprocess.run([*there, "-o", "remount,bind,ro", str(tmp_path / "run")], check=True)
        number, log = preflight(tmp_path, "--mpi off --on-bad warn", "--")
        code, output = ended(number, log)
    assert code == 0, output
    assert failures(tmp_path, number) == {("n4", "run folder")}
    assert "Read-only file system" in output


def test_where_nothing_works_every_node_is_named(tmp_path: Path) -> None:
    """The run folder is a file, so nobody can write; and in no time nobody answers."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preflight").write_text("")
    number, log = preflight(tmp_path, "--mpi off --json", "--")
    code, output = ended(number, log)
    assert code == 1, output
    report = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    failed = [(one["node"], one["name"]) for one in report["findings"] if one["state"] == "fail"]
    assert failed == [(node, "run folder") for node in ("n1", "n2", "n3", "n4")]
    (tmp_path / "run" / "preflight").unlink()

    number, log = preflight(tmp_path, "--mpi off --first-s 0.01", "--")
    code, output = ended(number, log)
    assert code == 1, output
    assert failures(tmp_path, number) == {(node, "hello") for node in ("n1", "n2", "n3", "n4")}


@pytest.mark.long
def test_a_node_with_a_slow_link_is_left_out_of_the_next_job(slurm: Machine, tmp_path: Path) -> None:
    job = ("--job-name=chain", "--dependency=singleton")
    go = tmp_path / "go"
    with slow_network(slurm, "n3"):
        wait = f"until [ -e {go} ]; do sleep 0.1; done; "
        number, log = preflight(tmp_path, "--on-bad exclude", "--", job=job, before=wait)
        successor = jobs.submit("--nodes=3", *job, f"--output={tmp_path}/next", "--wrap=srun hostname")
        subprocess.run(["scontrol", "update", f"JobId={successor}", "ExcNodeList=n2"], check=True)
        subprocess.run(["scontrol", "update", f"JobId={successor}", "NumNodes=2"], check=True)
        go.touch()
        code, output = ended(number, log)
    assert code == 75, output
    assert failures(tmp_path, number) == {("n3", "all-reduce")}
    assert f"preflight: left out of job {successor}: n3" in output
    jobs.wait_for_end(successor)
    assert sorted((tmp_path / "next").read_text().split()) == ["n1", "n4"]

    number, log = preflight(tmp_path, "--mpi off --on-bad exclude --most 3 --free-gib 1e9", "--")
    code, output = ended(number, log)
    assert code == 1, output
    assert "needed at most 3; look for one cause of all of them" in output


@pytest.mark.long
def test_a_node_that_does_not_answer_is_named(slurm: Machine, tmp_path: Path) -> None:
    """Its slurmd stands still, so srun hangs; --no-kill, as this Slurm gives a node up after ten seconds."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    wait = f"touch {ready}; until [ -e {go} ]; do sleep 0.1; done; "
    options = ("--mpi off", "--first-s 8", "--on-bad exclude", "--")
    number, log = preflight(tmp_path, *options, job=("--no-kill",), before=wait)
    helpers.wait_until(ready.exists, within_s=30, what="the job runs")
    (slurmd,) = [child for child in slurm.first("n3").children() if child.name() == "slurmd"]
    slurmd.send_signal(signal.SIGSTOP)
    go.touch()
    code, output = ended(number, log)
    # Thawed, it would wait to be asked for its state; started again it tells it.
    slurm.kill("n3")
    assert code == 1, output
    assert failures(tmp_path, number) == {("n3", "hello")}
    assert "no answer within 8 s" in output
    assert "no job named wrap is queued behind this one to leave out n3" in output


@pytest.mark.long
def test_a_rank_that_fails_on_one_node_is_found_by_pairs(slurm: Machine, tmp_path: Path) -> None:
    """No version tells that Horovod does not load on n3."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with slurm.mounted("n3", broken, Path(horovod.torch.__file__)):
        number, log = preflight(tmp_path, "--")
        code, output = ended(number, log)
    assert code == 1, output
    assert failures(tmp_path, number) == {("n3", "all-reduce")}
    assert "cannot open shared object file" in output


@pytest.mark.long
def test_the_batch_script_goes_on_without_a_bad_node(slurm: Machine, tiny_data: Path, tmp_path: Path) -> None:
    """A chain of jobs of three nodes: the first finds another package on n2, the second has the others."""
    site, run_folder = write_site(tmp_path, "none"), tmp_path / "run"
    site.write_text(site.read_text().replace("--nodes=2", "--nodes=3"))
    with site.open("a") as file:
        file.write(f'HVDLM_PREFLIGHT=1\nHVDLM_PREFLIGHT_OPTIONS="{" ".join(CALM)}"\n')
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "audit.py").write_bytes((package / "audit.py").read_bytes() + b"#")
    state = ["scontrol", "update", "NodeName=n4"]
    subprocess.run([*state, "State=DRAIN", "Reason=later"], check=True)
    with slurm.mounted("n2", package, PACKAGE):
        train = helpers.train_command(tiny_data, run_folder)
        first, second = batch_site.submit(site, train, "--chain", "2")
        jobs.wait_for_end(first, within_s=240)
        subprocess.run([*state, "State=UNDRAIN"], check=True)
        jobs.wait_for_end(second, within_s=240)
    assert jobs.exit_codes(first) == {"75"}, batch_site.log(site, first)
    assert "train_64gpu.sh: the preflight ended with 75: no ranks are started" in batch_site.log(site, first)
    assert jobs.exit_codes(second) == {"0"}, batch_site.log(site, second)
    reports = [json.loads((run_folder / "preflight" / f"{job}.json").read_text()) for job in (first, second)]
    assert [report["bad"] for report in reports] == [["n2"], []]
    assert [report["nodes"] for report in reports] == [["n1", "n2", "n3"], ["n1", "n3", "n4"]]
    assert helpers.exit_record(run_folder)["state"] == "done"
