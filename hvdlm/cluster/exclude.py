"""Keeps bad nodes out of the jobs that are queued behind this one.

The successors of a chain start a second after this job ends, while Slurm holds a requeued job back for two
minutes: so the successors are told which nodes not to take, and this job just ends.

Source: scontrol(1), job update of ExcNodeList and BeginTime of a requeued job.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.cluster.bounded import Outcome, run_bounded
from hvdlm.cluster.queue import ASK_LIMIT_S, queued
from hvdlm.config import UserError

_FILE = "excluded.json"


def nodes_of_job(env: Mapping[str, str]) -> tuple[str, ...]:
    """The names of this job's nodes.

    Raises:
        UserError: this is no job, or Slurm does not answer.
    """
    names = env.get("SLURM_JOB_NODELIST", "")
    if not names:
        raise UserError("preflight: found no Slurm job, needed one; start it in a batch script or salloc")
    outcome = run_bounded(["scontrol", "show", "hostnames", names], limit_s=ASK_LIMIT_S)
    if outcome.code != 0:
        raise UserError(f"preflight: scontrol show hostnames {names}: {outcome.reason}", exit_code=1)
    return tuple(outcome.output.split())


def exclude(bad: Sequence[str], folder: Path, env: Mapping[str, str], *, most: int) -> list[str]:
    """Have the queued jobs of this job's name leave out these nodes.

    Args:
        bad: names of nodes.
        folder: where the nodes that were left out so far are noted.
        env: this job's environment.
        most: nodes that may be left out in all, over all jobs of the run: what is wrong with so many is
            no fault of theirs.

    Returns:
        The numbers of the jobs that were told.

    Raises:
        UserError: too many, no job is queued, or Slurm refuses.
    """
    before = excluded(folder)
    together = sorted({*before, *bad})
    names = ",".join(bad)
    if len(together) > most:
        raise UserError(
            f"{folder / _FILE}: found {len(before)} node(s) left out before, and now {names}; needed at most "
            f"{most}; look for one cause of all of them, then remove the file",
            exit_code=1,
        )
    name = env.get("SLURM_JOB_NAME", "")
    known = queued(name)
    if known is None:
        raise UserError("preflight: squeue does not answer; submit again later", exit_code=1)
    jobs = [job.number for job in known if job.waits]
    if not jobs:
        raise UserError(
            f"preflight: no job named {name} is queued behind this one to leave out {names}; submit it again "
            f"with sbatch --exclude={names}",
            exit_code=1,
        )
    for job in jobs:
        _update(job, together)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(together) + "\n")
    return jobs


def excluded(folder: Path) -> list[str]:
    """The nodes that jobs of this run have left out so far."""
    try:
        return [str(name) for name in json.loads((folder / _FILE).read_text())]
    except (OSError, ValueError):
        return []


def _update(job: str, nodes: Sequence[str]) -> None:
    shown = _done(
        run_bounded(["scontrol", "--oneliner", "show", "job", job], limit_s=ASK_LIMIT_S), "scontrol"
    )
    own = re.search(r" ExcNodeList=(\S+)", shown)
    kept = [own[1]] if own and own[1] != "(null)" else []
    # Slurm reads a list of names and of ranges of names, and names in it twice.
    update = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*kept, *nodes])}"]
    _done(run_bounded(update, limit_s=ASK_LIMIT_S), " ".join(update))


def _done(outcome: Outcome, what: str) -> str:
    if outcome.code != 0:
        raise UserError(f"preflight: {what}: {outcome.reason}", exit_code=1)
    return outcome.output
