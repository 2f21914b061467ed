"""Stage-in: the ranks of each node copy the shards that this node needs to its own disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import UserError
from hvdlm.data.blend import Blend
from hvdlm.data.loader import BatchPlan
from hvdlm.data.sources import Source, shards_of
from hvdlm.data.stage import Copy, Staged, prepare_stage, stage_folder, stage_shards
from hvdlm.data.touched import samples_of, touched_shards

_POLL_S = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # One for each node, whatever containers call it.


@dataclass(frozen=True)
class Wanted:
    """What is staged: of the sources that `blend` draws from, by `data.stage`, for the steps after
    `start_step` to `end_step`, with the validation split or without."""

    sources: list[Source]
    blend: Blend
    stage: str
    plan: BatchPlan
    start_step: int
    end_step: int
    val: bool

    def copies(self, shares: list[tuple[int, int]], to: Sequence[Path]) -> list[Copy]:
        """The shards that these shares (d, D) of the ranks need, to the folder of each source."""
        samples = samples_of(self.plan, start_step=self.start_step, end_step=self.end_step, shares=shares)
        shards = touched_shards(self.sources, "train", samples, plan=self.plan, blend=self.blend)
        shards += shards_of(self.sources, "val") if self.val else []
        folders = {source.folder: folder for source, folder in zip(self.sources, to, strict=True)}
        return [Copy(entry, folder, folders[folder]) for folder, entry in shards]


def stage_in(wanted: Wanted, ranks: World, *, wants_stop: Callable[[], bool]) -> tuple[list[Source], str]:
    """Have what each node needs on its own disk.

    Args:
        wanted: equal on all ranks.
        ranks: of the run. Those with one kernel and one folder share the files.
        wants_stop: whether this rank should stop: all give up then.

    Returns:
        What to read from, and a line for the user. After a wish to stop these are the data sets
        themselves: the run does one more step before it leaves.

    Raises:
        AgreedError: on all ranks, where one of them could not do its part.

    Collective: yes.
    """
    begun = time.monotonic()
    places = _agree(lambda: _place(wanted), ranks, name="stage.places")
    peers = [rank for rank, place in enumerate(places) if place == places[ranks.rank]]
    to, share = [Path(folder) for folder in places[ranks.rank][1:]], (peers.index(ranks.rank), len(peers))
    copies = wanted.copies([(peer, ranks.size) for peer in peers], to)

    def prepare() -> None:
        if share[0] == 0:
            prepare_stage(copies)

    _agree(prepare, ranks, name="stage.prepare")
    parts = _agree(
        lambda: _copy(copies, share=share, ranks=ranks, wants_stop=wants_stop), ranks, name="stage.done"
    )
    if None in parts:
        return wanted.sources, "staging was stopped, reading from where the data is"
    done = sum((Staged(**part) for part in parts), Staged())
    nodes = len({tuple(place) for place in places})
    staged = [Source(folder, source.manifest) for source, folder in zip(wanted.sources, to, strict=True)]
    where = ", ".join(map(str, to))
    return staged, f"staged to {where} on {nodes} node(s): {done.summary(time.monotonic() - begun)}"


def _place(wanted: Wanted) -> list[str]:
    """The node of this rank, and the folder of each source there."""
    folders = (stage_folder(wanted.stage, source.manifest, os.environ) for source in wanted.sources)
    return [_BOOT_ID.read_text().strip(), *map(str, folders)]


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
    copies: list[Copy], *, share: tuple[int, int], ranks: World, wants_stop: Callable[[], bool]
) -> dict[str, int] | None:
    """Copy in a thread while the ranks tell each other that they live, fail or wish to stop: one that
    only waited for the slowest in the last collective would be taken for stalled."""
    stop, pool = threading.Event(), ThreadPoolExecutor(1, "stage")
    try:
        copying = pool.submit(stage_shards, copies, share=share, stop=stop)
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
