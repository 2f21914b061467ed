"""Stage-in: the ranks of each node copy the shards that this node needs to its own disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdlm.comm.world import World
from hvdlm.data.blend import Blend
from hvdlm.data.loader import BatchPlan
from hvdlm.data.sources import Source, shards_of
from hvdlm.data.stage import Copy, Staged, prepare_stage, stage_folder, stage_shards
from hvdlm.data.touched import samples_of, touched_shards
from hvdlm.train.together import agree, listening

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
    places = agree(lambda: _place(wanted), ranks, name="stage.places")
    peers = [rank for rank, place in enumerate(places) if place == places[ranks.rank]]
    to, share = [Path(folder) for folder in places[ranks.rank][1:]], (peers.index(ranks.rank), len(peers))
    copies = wanted.copies([(peer, ranks.size) for peer in peers], to)

    def prepare() -> None:
        if share[0] == 0:
            prepare_stage(copies)

    agree(prepare, ranks, name="stage.prepare")

    def copy(stop: threading.Event) -> dict[str, int] | None:
        done = stage_shards(copies, share=share, stop=stop)
        return asdict(done) if done else None

    parts = agree(
        lambda: listening(copy, ranks, wants_stop=wants_stop, name="stage.progress"), ranks, name="stage.done"
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
