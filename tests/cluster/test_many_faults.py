"""Fifty faults in a row over one run, of every kind, and nobody who helps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests import helpers
from tests.cluster import faults, jobs
from tests.cluster.batch_site import log, sbatch, write_site
from tests.cluster.one_machine import Machine

pytestmark = [pytest.mark.usefixtures("slurm"), pytest.mark.long]

SEED = 20261126
EVERY = 25
STEPS = 9000
CHAIN = 20
KINDS = {"USR2": 10, "TERM": 10, "preemption": 8, "kill of a rank": 10, "death of a node": 7, "requeue": 5}
SIGNALLED = ("USR2", "TERM", "preemption", "requeue")
"""The ranks are told, and have time to save."""
TRAIN = (
    *("--train.steps", str(STEPS), "--train.global_batch", "16", "--checkpoint.every", str(EVERY)),
    *("--eval.every", "0", "--log.every", "1000", "--parallel.strategy", "fixed"),
)


@dataclass(frozen=True)
class Round:
    """A fault and what came of it.

    Attributes:
        kind: a key of KINDS.
        attempt: the start that it ended.
        redone: steps that were done again.
        seconds: from the fault to the first new step.
        starts: until there was one.
    """

    kind: str
    attempt: int
    redone: int
    seconds: float
    starts: int


def inject(kind: str, machine: Machine, job: str, choose: Random) -> Callable[[], None]:
    """What repairs the machine, once the run has gone on without it."""
    if kind == "death of a node":
        faults.kill_node(machine, job, choose)
        return machine.repair
    acts = {
        "USR2": lambda: faults.tell(job, "USR2"),
        "TERM": lambda: faults.tell(job, "TERM"),
        "preemption": faults.preempt,
        "kill of a rank": lambda: faults.kill_rank(job, choose),
        "requeue": lambda: faults.requeue(job),
    }
    acts[kind]()
    return lambda: None


def one_round(kind: str, machine: Machine, run_folder: Path, choose: Random) -> Round:
    """A start that has left no checkpoint is let go on: after three of those a run gives up, as it should."""
    before = faults.position(run_folder).attempt
    resumed = faults.resumed_at(run_folder)
    helpers.wait_until(lambda: faults.saved_step(run_folder) >= resumed, within_s=90, what="a checkpoint")
    faults.wait_for_step(run_folder, faults.saved_step(run_folder) + choose.randrange(2 * EVERY))
    job = faults.current_job(run_folder)
    begin = time.monotonic()
    repair = inject(kind, machine, job, choose)
    faults.wait_for_start(run_folder, before)
    seconds = time.monotonic() - begin
    repair()
    ended = [start for start in faults.starts(run_folder) if start.attempt >= before]
    return Round(kind, before, sum(start.redone for start in ended), seconds, len(ended))


def report(rounds: list[Round], total_s: float) -> str:
    lines = [f"seed {SEED}, {len(rounds)} rounds in {total_s:.0f} s"]
    for kind in KINDS:
        of = [r for r in rounds if r.kind == kind]
        lines.append(
            f"{kind}: {len(of)} rounds; steps redone {sum(r.redone for r in of)}, at most "
            f"{max(r.redone for r in of)}; seconds to the first new step: median "
            f"{statistics.median(r.seconds for r in of):.1f}, at most {max(r.seconds for r in of):.1f}"
        )
    seconds = [r.seconds for r in rounds]
    lines.append(
        f"all: steps redone {sum(r.redone for r in rounds)}, at most {max(r.redone for r in rounds)}; "
        f"seconds: median {statistics.median(seconds):.1f}, at most {max(seconds):.1f}"
    )
    return "\n".join(lines)


def test_fifty_faults(machine: Machine, tiny_data: Path, tmp_path: Path) -> None:
    """Twenty jobs are queued at the start; the last queues itself again as long as it takes."""
    site, run_folder, choose = write_site(tmp_path, "none"), tmp_path / "run", Random(SEED)
    with site.open("a") as file:
        file.write("HVDLM_REQUEUES=100\n")
    command = helpers.train_command(tiny_data, run_folder, *TRAIN)
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    choose.shuffle(kinds)
    chain = [sbatch(site, command, "--partition=low") for _ in range(CHAIN)]
    begin = time.monotonic()
    faults.wait_for_start(run_folder, 0)
    rounds: list[Round] = []
    for kind in kinds:
        rounds.append(one_round(kind, machine, run_folder, choose))
        print(f"{len(rounds)} {rounds[-1]}", flush=True)
    last = faults.current_job(run_folder)
    jobs.wait_for_end(last, within_s=300)
    total_s = time.monotonic() - begin
    print(report(rounds, total_s), flush=True)
    assert jobs.exit_codes(last) == {"0"}, log(site, last)
    jobs.wait_for_end(chain[-1])
    assert all(r.redone == 0 for r in rounds if r.kind in SIGNALLED)
    assert all(r.redone < 2 * EVERY for r in rounds)
    faults.assert_undisturbed(run_folder, command, STEPS)
