"""What a probe says, and how it asks a library that may abort, hang or be missing."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Literal, final

from hvdlm.cluster.bounded import Outcome, run_bounded

State = Literal["ok", "warn", "fail", "skip"]
INSTALL = "run ./install.sh"
ACTIVATE = "activate the environment (. PREFIX/bin/activate) and load your MPI module, or run ./install.sh"


@final
@dataclass(frozen=True)
class Finding:
    """One line of the report: what was found, what is needed, how to get there."""

    name: str
    state: State
    found: str
    needed: str = ""
    fix: str = ""


def judge(name: str, ok: bool, *, found: str, needed: str, fix: str, otherwise: State = "fail") -> Finding:
    """A finding that is ok, or else carries its cure."""
    return Finding(name, "ok", found, needed) if ok else Finding(name, otherwise, found, needed, fix)


def ask(code: str, *, limit_s: float) -> tuple[dict[str, Any] | None, Outcome]:
    """Runs Python code in a bounded child.

    Returns:
        The last JSON object it printed, None where it printed none, and how it ended; a child
        that died later may still have said something.
    """
    outcome = run_bounded([sys.executable, "-c", code], limit_s=limit_s)
    for line in reversed(outcome.output.splitlines()):
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(said, dict):
            return said, outcome
    return None, outcome
