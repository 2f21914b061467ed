"""Stage-in: the ranks of each node copy the shards that this node needs to its own disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import UserError
from hvdlm.data.loader import BatchPlan
from hvdlm.data.manifest import Manifest
from hvdlm.data.stage import Staged, prepare_stage, stage_folder, stage_shards
from hvdlm.data.touched import samples_of, touched_shards

_POLL_S = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # One for each node, whatever containers call it.


@dataclass(frozen=True)
class Wanted:
    """What is staged of one data set: by `data.stage`, for the steps after `start_step` to `end_step`,
    with the validation split or without."""

    folder: Path
    manifest: Manifest
    stage: str
    plan: BatchPlan
    start_step: int
    end_step: int
    val: bool

    def names(self, shares: list[tuple[int, int]]) -> list[str]:
        """The shards that these shares (d, D) of the ranks need."""
        plan = self.plan
        samples = samples_of(plan, start_step=self.start_step, end_step=self.end_step, shares=shares)
        train = touched_shards(self.manifest, "train", samples, seq_len=plan.seq_len, seed=plan.seed)
        return train + [entry.name for entry in self.manifest.split("val") if self.val]


def stage_in(wanted: Wanted, ranks: World, *, wants_stop: Callable[[], bool]) -> tuple[Path, str]:
    """Have what each node needs of a data set on its own disk.

    Args:
        wanted: equal on all ranks.
        ranks: of the run. Those with one kernel and one folder share the files.
        wants_stop: whether this rank should stop: all give up then.

    Returns:
        The folder to read from, and a line for the user. After a wish to stop it is the data set
        itself: the run does one more step before it leaves.

    Raises:
        AgreedError: on all ranks, where one of them could not do its part.

    Collective: yes.
    """
    begun = time.monotonic()
    places = _agree(lambda: _place(wanted), ranks, name="stage.places")
    peers = [rank for rank, place in enumerate(places) if place == places[ranks.rank]]
    names = wanted.names([(peer, ranks.size) for peer in peers])
    to, share = Path(places[ranks.rank][1]), (peers.index(ranks.rank), len(peers))

    def prepare() -> None:
        if share[0] == 0:
            prepare_stage(wanted.manifest, names, to)

    _agree(prepare, ranks, name="stage.prepare")
    parts = _agree(
        lambda: _copy(wanted, names, to, share=share, ranks=ranks, wants_stop=wants_stop),
        ranks,
        name="stage.done",
    )
    if None in parts:
        return wanted.folder, f"staging was stopped, reading from {wanted.folder}"
    done = sum((Staged(**part) for part in parts), Staged())
    nodes = len({tuple(place) for place in places})
    return to, f"staged to {to} on {nodes} node(s): {done.summary(time.monotonic() - begun)}"


def _place(wanted: Wanted) -> tuple[str, str]:
    """The node of this rank and the folder there."""
    return _BOOT_ID.read_text().strip(), str(stage_folder(wanted.stage, wanted.manifest, os.environ))


def _agree(work: Callable[[], Any], ranks: World, *, name: str) -> list[Any]:
    """Do `work` on every rank: the JSON results of all, or one rank's error on all."""
    try:
        outcome: dict[str, Any] = {"result": work()}
    except UserError as error:
        outcome = {"error": f"rank {ranks.rank}: {error}", "exit_code": error.exit_code}
    outcomes = ranks.gather_json(outcome, name=name)
    for other in outcomes:
        if "error" in other:
            raise AgreedError(other["error"], other["exit_code"])
    return [other["result"] for other in outcomes]


def _copy(
    wanted: Wanted,
    names: list[str],
    to: Path,
    *,
    share: tuple[int, int],
    ranks: World,
    wants_stop: Callable[[], bool],
) -> dict[str, int] | None:
    """Copy in a thread while the ranks tell each other that they live, fail or wish to stop: one that
    only waited for the slowest in the last collective would be taken for stalled."""
    stop, pool = threading.Event(), ThreadPoolExecutor(1, "stage")
    try:
        copying = pool.submit(stage_shards, wanted.folder, wanted.manifest, names, to, share=share, stop=stop)
        busy = 1
        while busy:
            wait([copying], _POLL_S)
            finished = copying.done()
            leaving = wants_stop() or (finished and copying.exception() is not None)
            busy, leaving = ranks.sum_(
                torch.tensor([int(not finished), int(leaving)]), name="stage.progress"
            ).tolist()
            if leaving:
                stop.set()
        done = copying.result()
        return asdict(done) if done else None
    finally:
        # Without waiting: a thread that hangs in a read must not keep a failed job alive.
        stop.set()
        pool.shutdown(wait=False)
