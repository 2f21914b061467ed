"""An elastic run on a real Slurm: nodes are lost, other jobs lend theirs, and nobody can interfere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

from tests import helpers
from tests.cluster import jobs
from tests.cluster.one_machine import Machine

# Losses do not depend on the steps to come, and with this strategy no bit on the ranks.
ENDLESS = "--train.steps 100000 --checkpoint.every 400 --eval.every 0 --log.every 50".split()
SAME_BITS = "--optim.schedule constant --parallel.strategy fixed".split()
WITHIN_LOSS_S = 15
WITHIN_JOIN_S = 20


def elastic(data: Path, run: Path, *more: str) -> list[str]:
    """The driver's command."""
    paths = ["--data.path", str(data), "--train.out", str(run)]
    train = [*helpers.TINY, *ENDLESS, *SAME_BITS, *paths, *more]
    return [sys.executable, "-m", "hvdlm.elastic", "--slots", "1", *train]


def submit(command: list[str], log: Path, *options: str) -> str:
    """As a batch job that outlives the loss of nodes."""
    wrapped = f"--wrap=exec {shlex.join(command)}"
    return jobs.submit(f"--output={log}", "--no-kill", "--ntasks-per-node=1", *options, wrapped)


def world_size(log: Path) -> int:
    """Of the newest world, as the driver says."""
    sizes = re.findall(r"world \d+: (\d+) worker", log.read_text()) if log.exists() else []
    return int(sizes[-1]) if sizes else 0


def step(run: Path) -> int:
    return max([row["step"] for row in helpers.rows(run, "metrics.jsonl", kind="train")], default=0)


def trains_on(ranks: int, run: Path, log: Path, *, within_s: float) -> None:
    """Several new steps on so many ranks."""
    begun = step(run)

    def holds() -> bool:
        return world_size(log) == ranks and step(run) > begun + 5

    try:
        helpers.wait_until(holds, within_s=within_s, what=f"training on {ranks}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None


def stop_and_check(data: Path, run: Path, *, job: str, redone: int = 0) -> None:
    """Every sample once, and the losses of a run of one process that nothing happened to."""
    (run / "STOP").touch()
    jobs.wait_for_end(job)
    assert jobs.exit_codes(job) == {"75"}
    record = helpers.exit_record(run)
    assert (record["state"], record["exit_code"]) == ("stopped", 75)
    audit = helpers.run([sys.executable, "-m", "hvdlm.audit", str(run), "--json"])
    assert audit.returncode == 0, audit.stdout
    found = json.loads(audit.stdout)
    assert (found["steps"], found["void_steps"]) == (record["step"], redone)
    alone = run.with_name("alone")
    one = ["--data.path", str(data), "--train.out", str(alone), "--train.steps", str(record["step"])]
    done = helpers.run([sys.executable, "-m", "hvdlm.train", *helpers.TINY, *ENDLESS, *SAME_BITS, *one])
    assert done.returncode == 0, done.stdout
    assert helpers.losses(run) == helpers.losses(alone)


def test_a_node_is_lost(slurm: Machine, tiny_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(elastic(tiny_data, run), log, "--nodes=3")
    trains_on(3, run, log, within_s=90)
    slurm.kill("n3")
    trains_on(2, run, log, within_s=WITHIN_LOSS_S)
    stop_and_check(tiny_data, run, job=job)


def test_a_donor_joins_and_is_preempted(slurm: Machine, tiny_data: Path, tmp_path: Path) -> None:
    """Its job is of a low partition; TERM at the begin of the grace time means that it leaves."""
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(elastic(tiny_data, run), log, "--nodes=1", "--nodelist=n1")
    trains_on(1, run, log, within_s=90)
    join = f"srun {sys.executable} -m hvdlm.elastic --join {run} --slots 1"
    donor = ["--partition=low", "--nodelist=n2", "--exclusive", f"--output={tmp_path / 'donor'}"]
    jobs.submit(*donor, f"--wrap={join}")
    trains_on(2, run, log, within_s=WITHIN_JOIN_S)
    jobs.submit("--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    helpers.wait_until(lambda: "leaves: signal SIGTERM" in log.read_text(), within_s=30, what="it leaves")
    trains_on(1, run, log, within_s=WITHIN_LOSS_S)
    stop_and_check(tiny_data, run, job=job)
    assert "is lost" not in log.read_text()
