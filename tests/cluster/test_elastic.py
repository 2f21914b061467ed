"""An elastic run on a real Slurm: nodes are lost, other jobs lend theirs, and nobody can interfere."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import helpers
from tests.cluster import jobs
from tests.cluster.configuration import OUTSIDE
from tests.cluster.elastic_run import WITHIN_JOIN_S, WITHIN_LOSS_S, WITHIN_START_S, ElasticRun
from tests.cluster.one_machine import Machine
from tests.cluster.port_scan import answers, listening


@pytest.fixture
def run(slurm: Machine, tiny_data: Path, tmp_path: Path) -> Iterator[ElasticRun]:
    """One that has not begun."""
    yield ElasticRun(tiny_data, tmp_path)


def test_a_node_is_lost(slurm: Machine, run: ElasticRun) -> None:
    run.begin(3)
    run.trains_on(3, within_s=WITHIN_START_S)
    slurm.kill("n3")
    run.trains_on(2, within_s=WITHIN_LOSS_S)
    run.stop_and_check()


def test_a_donor_joins_and_is_preempted(run: ElasticRun) -> None:
    """Its job is of a low partition; TERM at the begin of the grace time means that it leaves."""
    run.begin(1)
    run.trains_on(1, within_s=WITHIN_START_S)
    donor = run.lend("n2")
    run.trains_on(2, within_s=WITHIN_JOIN_S)
    jobs.submit("--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    helpers.wait_until(lambda: "leaves: signal SIGTERM" in run.log, within_s=30, what="it leaves")
    run.trains_on(1, within_s=WITHIN_LOSS_S)
    subprocess.run(["scancel", donor], check=True)
    run.stop_and_check()
    assert "is lost" not in run.log


@pytest.mark.long
def test_nodes_go_one_after_the_other(slurm: Machine, run: ElasticRun) -> None:
    """One loses its network, one is drained, one dies; the first trains on, alone."""
    run.begin(4)
    run.trains_on(4, within_s=WITHIN_START_S)
    slurm.kill("n4", unplug=True)
    run.trains_on(3, within_s=WITHIN_LOSS_S)
    subprocess.run(["scontrol", "update", "nodename=n3", "state=drain", "reason=test"], check=True)
    run.trains_on(2, within_s=2 * WITHIN_LOSS_S)
    assert "host n3 leaves: its node is being drained" in run.log
    slurm.kill("n2")
    run.trains_on(1, within_s=WITHIN_LOSS_S)
    run.stop_and_check()


@pytest.mark.long
def test_donors_wait_for_the_driver_s_next_job(run: ElasticRun) -> None:
    """It is told that its time ends, and queues itself again; the donor's job goes on all the while."""
    run.begin(1)
    donor = run.lend("n2")
    run.trains_on(2, within_s=WITHIN_START_S)
    subprocess.run(["scancel", "--signal=USR2", run.job], check=True)
    helpers.wait_until(lambda: "queueing this job again" in run.log, within_s=60, what="the requeue")
    run.trains_on(2, within_s=2 * WITHIN_START_S)
    assert jobs.ask("squeue", "--noheader", f"--jobs={donor}", "--format=%T").strip() == "RUNNING"
    run.stop_and_check()
    assert "Restarts=1 " in jobs.ask("scontrol", "--oneliner", "show", "job", run.job)


@pytest.mark.long
def test_nobody_without_the_key_is_answered(slurm: Machine, run: ElasticRun) -> None:
    """Neither from a node of the run, nor from elsewhere; and what they send changes nothing."""
    run.begin(2)
    run.trains_on(2, within_s=WITHIN_START_S)
    ports = listening(run.job)
    assert ports, run.log
    for place in (OUTSIDE, "n2"):
        assert answers(slurm, place, ports) == {}
    run.trains_on(2, within_s=WITHIN_LOSS_S)
    run.stop_and_check()
    assert "world 2" not in run.log
