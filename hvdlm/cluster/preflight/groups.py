"""Starts the all-reduce over a group of nodes, and where it fails finds out by pairs on which node.

Pairs, and not halves of halves: all run at once, so two rounds do, however many nodes there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from hvdlm.cluster.bounded import Outcome, run_bounded
from hvdlm.cluster.preflight.fabric import ANSWER

MPIRUN = "mpirun"
_SPREAD = ("--overlap", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1")


@final
@dataclass(frozen=True)
class Spoken:
    """How an all-reduce over some nodes went.

    Attributes:
        trouble: what went wrong; empty where every rank had the right sums.
        ranks: what each rank said, by its node.
    """

    trouble: str
    ranks: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Launcher:
    """How ranks are started on nodes.

    Attributes:
        mpi: the type for `srun --mpi`, or 'mpirun'.
        command: what a rank runs; the seconds that it may take are added.
        folder: one for each start is made here, where ranks without a PMI meet.
    """

    mpi: str
    command: tuple[str, ...]
    folder: Path

    def allreduce(self, nodes: Sequence[str], *, limit_s: float) -> Spoken:
        """Sum over a rank on each of these nodes."""
        names = ",".join(nodes)
        if self.mpi == MPIRUN:
            start = [MPIRUN, "-np", str(len(nodes)), "--host", names, "--map-by", "node", "--bind-to", "none"]
        else:
            many = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", f"--nodelist={names}"]
            start = ["srun", f"--mpi={self.mpi}", *many, *_SPREAD]
        meeting = self.folder / f"meet-{time.monotonic_ns()}"
        command = [*start, *self.command, "--meeting", str(meeting), "--limit-s", f"{limit_s:.0f}"]
        env = {"OMP_NUM_THREADS": "1"}
        if os.geteuid() == 0:
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        outcome = run_bounded(command, limit_s=limit_s, more_env=env)
        shutil.rmtree(meeting, ignore_errors=True)
        return _spoken(outcome, nodes)


def _spoken(outcome: Outcome, nodes: Sequence[str]) -> Spoken:
    ranks = answers(outcome.output)
    silent = [node for node in nodes if node not in ranks]
    wrong = [node for node, said in ranks.items() if not said["right"]]
    if wrong:
        return Spoken(f"wrong sums on {', '.join(wrong)}", ranks)
    if silent or outcome.code != 0:
        return Spoken(_cause(outcome), ranks)
    return Spoken("", ranks)


def answers(output: str) -> dict[str, dict[str, Any]]:
    """What the ranks said, by node: mpirun forwards in pieces, so that two ranks may share a line."""
    decoder, ranks = json.JSONDecoder(), {}
    for text in output.split(ANSWER)[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            said, _ = decoder.raw_decode(text.lstrip())
            ranks[said["node"]] = said
    return ranks


def _cause(outcome: Outcome) -> str:
    """The reason, from what ranks said rather than from what srun says of them."""
    own = [line for line in outcome.output.splitlines() if not line.startswith(("srun:", "slurmstepd"))]
    return Outcome(outcome.code, "\n".join(own) or outcome.output, outcome.trouble).reason


def culprits(launcher: Launcher, nodes: Sequence[str], *, limit_s: float) -> dict[str, str]:
    """Of nodes whose common all-reduce failed, those that fail in pairs with good ones too.

    Args:
        launcher: starts the pairs, all of a round at once.
        nodes: at least two.
        limit_s: seconds for each of two rounds.

    Returns:
        What went wrong, by node; empty where no node alone is to blame.
    """
    pairs = [tuple(nodes[i : i + 2]) for i in range(0, len(nodes) - 1, 2)]
    spoken = dict(_all_at_once(launcher, pairs, limit_s=limit_s))
    good = [node for pair in pairs if not spoken[pair].trouble for node in pair]
    left_over = [nodes[-1]] if len(nodes) % 2 else []
    suspects = [node for pair in pairs if spoken[pair].trouble for node in pair]
    if good:
        suspects += left_over
    # With no good pair the one left over stands in: it is good if any pair with it is.
    known = good or left_over
    if not known:
        return {}
    second = [(known[i % len(known)], suspect) for i, suspect in enumerate(suspects)]
    again = dict(_all_at_once(launcher, second, limit_s=limit_s))
    if not good and all(one.trouble for one in again.values()):
        return {}
    return {pair[1]: f"with {pair[0]}: {one.trouble}" for pair, one in again.items() if one.trouble}


def _all_at_once(
    launcher: Launcher, groups: Sequence[tuple[str, ...]], *, limit_s: float
) -> Iterator[tuple[tuple[str, ...], Spoken]]:
    with ThreadPoolExecutor(max_workers=max(1, len(groups))) as pool:
        yield from zip(
            groups, pool.map(lambda group: launcher.allreduce(group, limit_s=limit_s), groups), strict=True
        )
