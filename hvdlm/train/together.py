"""Work of every rank before the first step: it fails on all ranks together, and can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import UserError

_POLL_S = 0.5
T = TypeVar("T")


def agree(work: Callable[[], Any], ranks: World, *, name: str) -> list[Any]:
    """Do `work` on every rank.

    Args:
        work: its result is JSON.
        ranks: of the run.
        name: of the collective.

    Returns:
        The results of all ranks, in their order.

    Raises:
        AgreedError: on all ranks, where one of them met a `UserError`.

    Collective: yes.
    """
    try:
        outcome: dict[str, Any] = {"result": work()}
    except UserError as error:
        outcome = {"error": f"rank {ranks.rank}: {error}", "exit_code": error.exit_code}
    outcomes = ranks.gather_json(outcome, name=name)
    for other in outcomes:
        if "error" in other:
            raise AgreedError(other["error"], other["exit_code"])
    return [other["result"] for other in outcomes]


def listening(
    work: Callable[[threading.Event], T], ranks: World, *, wants_stop: Callable[[], bool], name: str
) -> T:
    """Do `work` in a thread while the ranks tell each other that they live, fail or wish to stop: one that
    only waited for the slowest in the last collective would be taken for stalled.

    Args:
        work: on each rank, until its event is set: one of them failed, or wishes to stop.
        ranks: of the run.
        wants_stop: whether this rank should stop.
        name: of the collective.

    Raises:
        Exception: what `work` raised on this rank.

    Collective: yes.
    """
    stop, pool = threading.Event(), ThreadPoolExecutor(1, name)
    try:
        working = pool.submit(work, stop)
        busy = 1
        while busy:
            wait([working], _POLL_S)
            finished = working.done()
            leaving = wants_stop() or (finished and working.exception() is not None)
            busy, leaving = ranks.sum_(torch.tensor([int(not finished), int(leaving)]), name=name).tolist()
            if leaving:
                stop.set()
        return working.result()
    finally:
        # Without waiting: a thread that hangs in a read must not keep a failed job alive.
        stop.set()
        pool.shutdown(wait=False)
