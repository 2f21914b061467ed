"""Jobs as Slurm's controller knows them; every question has a time limit."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from hvdlm.cluster.bounded import MARK, run_bounded

ASK_LIMIT_S = 15.0

_EPOCH = {"SLURM_TIME_FORMAT": "%s"}
# Id, state, why it waits, handed in, begin, end, time limit, nodes, name.
_FORMAT = "%i|%T|%r|%V|%S|%e|%l|%D|%j"


@final
@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue; times are seconds since 1970, 0 where there is none.

    Attributes:
        number: of the job.
        state: PENDING, RUNNING, COMPLETING and the like.
        waits_for: Slurm's reason while it is pending.
        limit_s: its time limit in seconds; 0 = none.
    """

    number: str
    state: str
    waits_for: str
    submitted_unix: float
    begins_unix: float
    ends_unix: float
    limit_s: float
    nodes: int
    name: str

    @property
    def waits(self) -> bool:
        """It has not begun."""
        return self.state == "PENDING"


@final
@dataclass(frozen=True)
class OwnJob:
    """What a batch job needs to know of itself.

    Attributes:
        number: '' outside of any job.
        submitted_unix: when it was handed in; 0 where the controller gave no answer.
        ends_unix: when its time is over; 0 = never, or not known.
        log: where its output goes; '' where that is not known.
        trouble: why there was no answer.
    """

    number: str = ""
    submitted_unix: float = 0.0
    ends_unix: float = 0.0
    log: str = ""
    trouble: str = ""


def own_job(env: Mapping[str, str]) -> OwnJob:
    """What Slurm knows of this process's job: told by the batch script, else the controller is asked."""
    number, shown = env.get("SLURM_JOB_ID", ""), env.get("HVDLM_JOB", "")
    if not number:
        return OwnJob()
    if f"JobId={number} " not in shown:
        command = ["scontrol", "--oneliner", "show", "job", number]
        outcome = run_bounded(command, limit_s=ASK_LIMIT_S, more_env=_EPOCH)
        if outcome.code != 0:
            return OwnJob(number, trouble=f"scontrol: {outcome.reason}")
        shown = outcome.output
    submitted, ends = (_time(name, shown) for name in ("SubmitTime", "EndTime"))
    log = re.search(r" StdOut=(.*?)(?: \w+=|\s*$)", shown)
    return OwnJob(number, submitted, ends, log[1] if log else "")


def queued(name: str = "", *, numbers: tuple[str, ...] = ()) -> list[QueuedJob] | None:
    """This user's jobs of a name, or of these numbers, in the queue or running; by their numbers.

    Returns:
        None where the controller gave no answer.
    """
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--format={_FORMAT}"]
    outcome = run_bounded(command, limit_s=ASK_LIMIT_S, more_env=_EPOCH)
    if outcome.code != 0:
        return None
    jobs = [_parse(line) for line in outcome.output.splitlines() if line.count("|") >= 8]
    return sorted(
        (job for job in jobs if job.name == name or job.number in numbers), key=lambda job: _order(job.number)
    )


def cancel(jobs: list[QueuedJob]) -> str:
    """End jobs, waiting ones or running ones; why not, or ''."""
    if not jobs:
        return ""
    outcome = run_bounded(["scancel", *(job.number for job in jobs)], limit_s=ASK_LIMIT_S)
    return "" if outcome.code == 0 else f"scancel: {outcome.reason}"


def hand_in(arguments: Sequence[str], *, env: Mapping[str, str]) -> tuple[str, str]:
    """Call sbatch.

    Args:
        arguments: its options, the script, and the script's arguments.
        env: variables on top of this process's own.

    Returns:
        The job's number, or '' and why there is none.
    """
    # The job inherits sbatch's environment: with the mark in it the job would count as a child of this
    # process, and be killed with it. So it is `timeout` that bounds sbatch.
    command = ["env", "-u", MARK, "timeout", f"{ASK_LIMIT_S:g}", "sbatch", "--parsable", *arguments]
    outcome = run_bounded(command, limit_s=2 * ASK_LIMIT_S, more_env=env)
    number = outcome.output.strip().splitlines()[-1].partition(";")[0] if outcome.code == 0 else ""
    return (number, "") if number.isdigit() else ("", f"sbatch: {outcome.reason}")


def try_out(arguments: Sequence[str], *, env: Mapping[str, str]) -> tuple[bool, str]:
    """`sbatch --test-only`: whether Slurm would take the job, and what it says."""
    outcome = run_bounded(["sbatch", "--test-only", *arguments], limit_s=ASK_LIMIT_S, more_env=env)
    said = outcome.output.strip().splitlines()
    return outcome.code == 0, outcome.trouble or (said[-1].removeprefix("sbatch: ") if said else "")


def mpi_types() -> list[str]:
    """What `srun --mpi` takes here; none where srun does not answer."""
    outcome = run_bounded(["srun", "--mpi=list"], limit_s=ASK_LIMIT_S)
    return re.findall(r"\b(?:none|openmpi|cray_shasta|pmi\w*)\b", outcome.output) if outcome.code == 0 else []


def seconds_of(limit: str) -> float:
    """A time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 for none and UNLIMITED."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or not (days.isdigit() or not dash):
        return 0.0
    numbers = [float(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0.0, 0.0][:3]
        return 86400 * float(days) + 3600 * hours + 60 * minutes + seconds
    if len(numbers) == 3:
        return 3600 * numbers[0] + 60 * numbers[1] + numbers[2]
    return 60 * numbers[0] + (numbers[1] if len(numbers) == 2 else 0.0)


def _parse(line: str) -> QueuedJob:
    number, state, reason, submitted, begins, ends, limit, nodes, name = line.split("|", 8)
    return QueuedJob(
        number,
        state,
        reason,
        _unix(submitted),
        _unix(begins),
        _unix(ends),
        seconds_of(limit),
        int(nodes) if nodes.isdigit() else 0,
        name,
    )


def _time(name: str, shown: str) -> float:
    found = re.search(rf" {name}=(\d+)", shown)
    return float(found[1]) if found else 0.0


def _unix(text: str) -> float:
    return float(text) if text.isdigit() else 0.0


def _order(number: str) -> tuple[int, str]:
    digits = re.match(r"\d+", number)
    return (int(digits[0]) if digits else 0, number)
