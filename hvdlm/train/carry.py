"""What a worker of an elastic run carries in its memory from one world to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, final

import torch

from hvdlm.cluster.elastic.horovod_member import HorovodMember
from hvdlm.comm.member import Member
from hvdlm.comm.world import World
from hvdlm.parallel.strategy import Read
from hvdlm.run import exit_record, ledger
from hvdlm.run.folder import Start
from hvdlm.run.progress import Progress

Places: TypeAlias = Member | HorovodMember
"""Where a worker's worlds come from: our driver, or Horovod's."""


@final
@dataclass(frozen=True)
class Carry:
    """How far a run is, by a worker whose world is over.

    Attributes:
        before: how that world began.
        progress: where it was.
    """

    before: Start
    progress: Progress

    def start(self, run_folder: Path) -> Start:
        """How the next world begins; also completes the ledger. For its rank 0."""
        ledger.add_missing(run_folder, self.progress.rows)
        last = max(ledger.attempts(run_folder), exit_record.last_attempt(run_folder))
        return replace(
            self.before,
            attempt=last + 1,
            checkpoint="",
            step=self.progress.step,
            notes=[],
            course=self.progress.course,
            best=self.progress.best,
        )


@final
@dataclass(frozen=True)
class Elastic:
    """What a worker of an elastic run has besides.

    Attributes:
        member: its way to the driver.
        tensors: the training state on the CPU, by its canonical names, on rank 0 where it comes from there.
    """

    member: Places
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def shared_read(tensors: Mapping[str, torch.Tensor], ranks: World) -> Read:
    """Reads rank 0's tensors on all ranks, which have to ask for the same in the same order.

    Args:
        tensors: whole ones on the CPU; counts on rank 0 only.
        ranks: of this world.

    Returns:
        Gives whole tensors only. Collective.

    Collective: yes.
    """
    kinds = {name: str(values.dtype).removeprefix("torch.") for name, values in tensors.items()}
    kinds = ranks.broadcast_json(kinds, name="carry.kinds")

    def read(
        name: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        global_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        values = tensors[name] if ranks.is_root else torch.empty(shape, dtype=getattr(torch, kinds[name]))
        return ranks.broadcast_(values.contiguous(), name=f"carry.{name}")

    return read
