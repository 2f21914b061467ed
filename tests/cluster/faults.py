"""What befalls the jobs of a run on a cluster, and how the run came through."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hvdlm.run import restore
from tests import helpers
from tests.cluster import batch_site, jobs
from tests.cluster.one_machine import Machine

_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Position:
    """Where a run is: its newest start that did a step, and that step; (0, 0) before the first."""

    attempt: int
    step: int


def position(run_folder: Path) -> Position:
    """By the last rows of metrics.jsonl: the whole file would be read twenty times a second."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return Position(0, 0)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if b'"kind": "train"' in line and line.startswith(b"{"):
            row = json.loads(line)
            return Position(row["attempt"], row["step"])
    return Position(0, 0)


def wait_for_start(run_folder: Path, after: int, *, within_s: float = 240) -> float:
    """Until a start later than attempt `after` has done a step; the seconds it took."""
    return helpers.wait_until(
        lambda: position(run_folder).attempt > after,
        within_s=within_s,
        what=f"a step of a start after attempt {after} of {run_folder}",
    )


def wait_for_step(run_folder: Path, step: int, *, within_s: float = 90) -> None:
    """Until the newest start has done a step."""
    helpers.wait_until(
        lambda: position(run_folder).step >= step, within_s=within_s, what=f"step {step} of {run_folder}"
    )


def saved_step(run_folder: Path) -> int:
    """That of the newest checkpoint; 0 where there is none."""
    folders = restore.folders(run_folder / "checkpoints")
    return int(folders[-1].name.partition("-")[2]) if folders else 0


def resumed_at(run_folder: Path) -> int:
    """The first step of the newest start."""
    opened = [row for row in helpers.rows(run_folder, "ledger.jsonl") if "resumed_at" in row]
    return int(opened[-1]["resumed_at"])


def current_job(run_folder: Path) -> str:
    """The job that trains, or did last."""
    return str(batch_site.rows(run_folder, "begun")[-1]["job"])


def nodes_of(job: str) -> list[str]:
    """The nodes of a running job; the first has its batch script."""
    listed = jobs.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
    return jobs.ask("scontrol", "show", "hostnames", listed).split()


def state_of(job: str) -> str:
    """As squeue and sacct have it."""
    (word,) = (w for w in jobs.ask("scontrol", "--oneliner", "show", "job", job).split() if "JobState=" in w)
    return word.partition("=")[2]


def tell(job: str, number: str) -> None:
    """`scancel --signal`: the ranks hear it, the batch script does not."""
    subprocess.run(["scancel", f"--signal={number}", job], check=True)


def preempt() -> str:
    """Another user's job of higher rank needs all nodes for a moment; its number."""
    return jobs.submit(
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        "--job-name=other",
        "--output=/dev/null",
        "--wrap=true",
    )


def requeue(job: str) -> None:
    """As an administrator does."""
    subprocess.run(["scontrol", "requeue", job], check=True)


def kill_rank(job: str, choose: Random) -> None:
    """kill -9 of one of two ranks."""
    helpers.send(batch_site.rank(job, choose.randrange(2)), signal.SIGKILL)


def kill_node(machine: Machine, job: str, choose: Random) -> str:
    """A node of the job dies, every other time without a word; its name."""
    node = choose.choice(nodes_of(job))
    machine.kill(node, unplug=choose.random() < 0.5)
    return node


@dataclass(frozen=True)
class Start:
    """A start of a run after which another came; `redone` of its steps were done again."""

    attempt: int
    resumed_at: int
    last_step: int
    redone: int


def starts(run_folder: Path) -> list[Start]:
    """All but the last. The ledger alone would not tell: rank 0 may die with rows in its hands."""
    opened = [row for row in helpers.rows(run_folder, "ledger.jsonl") if "resumed_at" in row]
    last: dict[int, int] = {}
    for row in helpers.rows(run_folder, "metrics.jsonl", kind="train"):
        last[row["attempt"]] = row["step"]
    found = []
    for this, following in itertools.pairwise(opened):
        step = last.get(this["attempt"], this["resumed_at"] - 1)
        redone = step + 1 - following["resumed_at"]
        found.append(Start(this["attempt"], this["resumed_at"], step, redone))
    return found


def assert_undisturbed(run_folder: Path, command: list[str], steps: int) -> None:
    """Every sample was consumed once, and the losses are those of an undisturbed run.

    With strategy fixed of one on one process, to the last bit. The sums of other strategies are rounded
    otherwise on another number of ranks, and a learning rate as large as this makes much of that: there the
    run is on two ranks.

    Args:
        run_folder: of the run.
        command: that trained it.
        steps: that it did.
    """
    audit = helpers.run([sys.executable, "-m", "hvdlm.audit", str(run_folder)])
    assert audit.returncode == 0, audit.stdout
    assert f": {steps:,} steps in 1 stage(s)" in audit.stdout, audit.stdout
    assert "proven: every sample was consumed exactly once" in audit.stdout
    alone = run_folder.with_name("undisturbed")
    place = command.index("--train.out") + 1
    fixed = "fixed" in command
    reference = [*command[:place], str(alone), *command[place + 1 :], "--train.steps", str(steps)]
    reference = reference if fixed else [*helpers.mpirun(2), *reference]
    with helpers.started(reference, {}) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    expected = helpers.losses(alone)
    # A start that was killed may have done more.
    found = {step: loss for step, loss in helpers.losses(run_folder).items() if step <= steps}
    assert sorted(found) == sorted(expected) == list(range(1, steps + 1))
    apart = [s for s in expected if abs(found[s] - expected[s]) > (0 if fixed else 1e-4)]
    assert not apart, f"another loss than undisturbed in {len(apart)} step(s), first {apart[0]}"
