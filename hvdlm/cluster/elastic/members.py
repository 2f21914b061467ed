"""The hosts and workers of an elastic run, and how those of one world are ranked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Policy:
    """Limits of an elastic run.

    Attributes:
        min_workers: with fewer the run waits.
        first_workers: how many the first world waits for, at most `start_wait_s`.
        settle_s: joiners are taken in when the last one has been ready for so long.
        agent_silent_s: a host without a sign of life is lost.
        worker_silent_s: so is a worker, which its host otherwise vouches for.
        broken_silent_s: both are sooner where a world broke, which they may be the cause of.
        first_wait_s: before a slot whose worker died is filled again; doubled each time.
        longest_wait_s: and at most so long.
        most_failures: worlds in a row that may fail without a new step.
    """

    min_workers: int = 1
    first_workers: int = 1
    start_wait_s: float = 120.0
    settle_s: float = 2.0
    agent_silent_s: float = 10.0
    worker_silent_s: float = 30.0
    broken_silent_s: tuple[float, float] = (3.0, 8.0)
    first_wait_s: float = 5.0
    longest_wait_s: float = 300.0
    most_failures: int = 5


@final
@dataclass
class Agent:
    """A host that runs workers.

    Attributes:
        name: unique; a host that comes back has another.
        host: its name.
        slots: workers it can run.
        job: the batch job it is in, or ''.
        leaving: why it must go soon; '' = it stays.
        heard_s: its last sign of life.
        started: workers it was told to start so far.
        strikes: how often workers of it died.
        not_before_s: when its free slots are filled again.
    """

    name: str
    host: str
    slots: int
    job: str
    leaving: str = ""
    heard_s: float = 0.0
    started: int = 0
    strikes: int = 0
    not_before_s: float = 0.0


@final
@dataclass
class Worker:
    """A process that trains.

    Attributes:
        name: unique.
        agent: its host.
        slot: which of its host's.
        waiting: it is in no world and wants one.
        generation: the last world it was in; 0 = none.
        prepared: it is about to start Horovod there, or has.
        lost: that world ended for it because another rank was gone.
        step: the last step that its memory holds whole; -1 = none.
        heard_s: its last sign of life; 0 = none yet.
        ready_s: since when it waits for its first world.
        dismissed: it was told to end.
    """

    name: str
    agent: Agent
    slot: int
    waiting: bool = False
    generation: int = 0
    prepared: bool = False
    lost: bool = False
    step: int = -1
    heard_s: float = 0.0
    ready_s: float = 0.0
    dismissed: bool = False


def ranked(workers: Iterable[Worker]) -> list[Worker]:
    """In the order of their ranks: first a host that has the newest state, and on it a worker that has it.

    The ranks of a host follow each other, as launchers have it.
    """
    every = list(workers)
    newest = max(every, key=lambda w: w.step).step
    holders = [w for w in every if w.step == newest]
    hosts = list(dict.fromkeys(w.agent.name for w in [*holders, *every]))
    return sorted(every, key=lambda w: (hosts.index(w.agent.name), w.step != newest, w.slot))


def place_of(worker: Worker, members: Sequence[Worker]) -> dict[str, Any]:
    """A worker's rank among all, on its host, and across the hosts that have so many.

    Args:
        worker: one of the members.
        members: in the order of their ranks.

    Returns:
        `rank`, `size`, `local_rank`, `local_size`, `cross_rank`, `cross_size`, `host`, and `step`: the one
        in the memory of rank 0, -1 where it has none.
    """
    of_hosts: dict[str, list[Worker]] = {}
    for member in members:
        of_hosts.setdefault(member.agent.name, []).append(member)
    own = of_hosts[worker.agent.name]
    local_rank = own.index(worker)
    across = [name for name, there in of_hosts.items() if len(there) > local_rank]
    return {
        "rank": list(members).index(worker),
        "size": len(members),
        "local_rank": local_rank,
        "local_size": len(own),
        "cross_rank": across.index(worker.agent.name),
        "cross_size": len(across),
        "host": worker.agent.name,
        "step": members[0].step,
    }
