"""How long a site lets a job go on after it was told to end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from hvdlm.cluster.bounded import run_bounded
from hvdlm.cluster.queue import ASK_LIMIT_S
from hvdlm.config import EXIT_CRASH, UserError

_KILL_WAIT_S = 30.0
_NOT_BY_PARTITION = ("", "(null)", "preempt/none", "preempt/qos")


@final
@dataclass(frozen=True)
class Grace:
    """Seconds from a signal to the kill.

    Attributes:
        kill_wait_s: after scancel, and at the time limit where no earlier signal was asked for.
        preempted_s: in this partition; None where jobs are not preempted, or by rules that only the
            accounting knows (quality of service).
        partition: its name.
    """

    kill_wait_s: float
    preempted_s: float | None
    partition: str


def site_grace(env: Mapping[str, str]) -> Grace:
    """Ask the controller.

    Args:
        env: the job's environment.

    Raises:
        UserError: it does not answer.

    Source: slurm.conf(5): KillWait, PreemptType, and of a partition GraceTime and PreemptMode.
    """
    partition = env.get("SLURM_JOB_PARTITION", "")
    config = _ask("config")
    shown = _ask("partition", partition)
    kill_wait = _value("KillWait", config)
    wait_s = float(kill_wait) if kill_wait.isdigit() else _KILL_WAIT_S
    kind, mode = _value("PreemptType", config), _value("PreemptMode", shown)
    if kind in _NOT_BY_PARTITION or mode in ("", "OFF"):
        return Grace(wait_s, None, partition)
    grace = _value("GraceTime", shown)
    # After its grace a preempted job gets what a cancelled one gets.
    return Grace(wait_s, (float(grace) if grace.isdigit() else 0.0) + wait_s, partition)


def _value(name: str, shown: str) -> str:
    """Of `Name = VALUE` or `Name=VALUE`; '' where there is none."""
    found = re.search(rf"\b{name}\s*=\s*(\S+)", shown)
    return found[1] if found else ""


def _ask(*what: str) -> str:
    outcome = run_bounded(["scontrol", "show", *what], limit_s=ASK_LIMIT_S)
    if outcome.code != 0:
        raise UserError(f"rehearse: scontrol show {' '.join(what)}: {outcome.reason}", EXIT_CRASH)
    return outcome.output
