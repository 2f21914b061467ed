"""The processes of one run: Horovod's start and end, and named collectives between all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvdlm.comm import rendezvous
from hvdlm.comm.launch import UNKNOWN, Launch, needs_meeting
from hvdlm.config import UserError

# Horovod's element counts are int32 in places.
_BROADCAST_BYTES = 2**30


LostPeerError = HorovodInternalError
"""A collective failed because another rank is gone."""


class AgreedError(UserError):
    """A user error that every rank raises at the same place, so that all can leave in order."""


def init(launch: Launch, settings: Mapping[str, str], *, meeting: Path | None = None) -> World:
    """Start MPI (where the launch is *mpi*) and Horovod.

    Args:
        launch: how this process was launched, from `comm.launch.classify`.
        settings: environment variables from `comm.launch.process_settings`, set here.
        meeting: a folder all ranks see, where those of a plain srun find each other; None = they do not.

    Returns:
        The world of this run; `close()` it at the end.

    Raises:
        UserError: the number of ranks is not what the launcher announced (a PMI that the MPI
            library cannot use makes every rank a world of its own), MPI lacks threads, or the ranks have
            no place to meet.

    Collective: yes.
    """
    meets = needs_meeting(launch, {**os.environ, **settings})
    if meets and meeting is None:
        raise UserError(
            f"launch: srun started {launch.size} tasks without PMIx, so each would work alone; use "
            "srun --mpi=pmix (srun --mpi=list shows what there is) or mpirun, or one task"
        )
    os.environ.update(settings)
    if meets and meeting is not None:
        os.environ.update(rendezvous.meet(launch, meeting, os.environ))
    if "OMP_NUM_THREADS" in settings:
        # torch read the environment when it was imported.
        torch.set_num_threads(int(settings["OMP_NUM_THREADS"]))
    if launch.kind == "mpi":
        _init_mpi()
    if launch.local_size == UNKNOWN:
        local_rank, local_size = _ask_mpi()
        launch = replace(launch, local_rank=local_rank, local_size=local_size)
    hvd.init()
    if hvd.size() != launch.size:
        raise UserError(
            f"launch: the launcher started {launch.size} tasks, Horovod found {hvd.size()} rank(s); "
            "the MPI library does not know this launcher's PMI: use mpirun, or srun --mpi=pmix"
        )
    world = World(replace(launch, rank=hvd.rank()))
    if meets and meeting is not None:
        # Everybody has read it: Horovod came up.
        world.barrier(name="world.met")
        if world.is_root:
            rendezvous.forget(meeting)
    return world


@final
class World:
    """The ranks of a run and what they say to each other.

    Attributes:
        rank: this process, 0 <= rank < size.
        size: number of processes.
        local_rank: this process among those of its host.
        kind: 'single', 'mpi' or 'gloo'.

    Every method but `abort` is collective: all ranks call it, in the same order and with the same
    name. With one process they return at once.
    """

    def __init__(self, launch: Launch) -> None:
        self.rank = launch.rank
        self.size = launch.size
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size
        self.kind = launch.kind
        self._has_timeline = False

    @property
    def is_root(self) -> bool:
        """True on rank 0, the one that writes and prints."""
        return self.rank == 0

    def sum_(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Sum over all ranks, in place (int32/64 or fp32/64)."""
        if self.size > 1:
            hvd.allreduce_(values, op=hvd.Sum, name=name)
        return values

    def any(self, flag: bool, *, name: str) -> bool:
        """True on every rank if `flag` is true on one."""
        return bool(self.sum_(torch.tensor([int(flag)]), name=name).item())

    def broadcast_(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Copy rank 0's contiguous tensor of any dtype to all ranks, in place, bit by bit."""
        if self.size > 1:
            flat = values.view(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _BROADCAST_BYTES):
                hvd.broadcast_(flat[start : start + _BROADCAST_BYTES], root_rank=0, name=f"{name}.{start}")
        return values

    def broadcast_json(self, value: Any, *, name: str) -> Any:
        """Rank 0's JSON value on all ranks (never a pickle)."""
        if self.size == 1:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = self.broadcast_(torch.tensor([data.numel()]), name=f"{name}.length")
        buffer = data if self.is_root else torch.empty(int(length.item()), dtype=torch.uint8)
        return json.loads(self.broadcast_(buffer, name=f"{name}.data").numpy().tobytes())

    def gather_json(self, value: Any, *, name: str) -> list[Any]:
        """Every rank's JSON value on every rank, in rank order."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode() + b"\n"
        gathered = hvd.allgather(torch.frombuffer(bytearray(text), dtype=torch.uint8), name=name)
        return [json.loads(line) for line in gathered.numpy().tobytes().splitlines()]

    def on_root(self, work: Callable[[], Any], *, name: str) -> Any:
        """Do `work` on rank 0 and give its JSON result to all.

        Raises:
            AgreedError: on every rank, when `work` raised a `UserError` on rank 0.
        """
        outcome: dict[str, Any] = {}
        if self.is_root:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"error": str(error), "exit_code": error.exit_code}
        outcome = self.broadcast_json(outcome, name=name)
        if "error" in outcome:
            raise AgreedError(outcome["error"], outcome["exit_code"])
        return outcome["result"]

    def barrier(self, *, name: str) -> None:
        """Wait until every rank is here."""
        self.sum_(torch.zeros(1), name=name)

    def start_timeline(self, path: Path) -> None:
        """Have Horovod write what it sends, and when, until `close`; with one process it sends nothing.

        Args:
            path: rank 0 writes it, as a JSON array of trace events.

        Raises:
            ValueError: `process_settings` was not told of it.
        """
        if self.size > 1:
            hvd.start_timeline(str(path))
            self._has_timeline = True

    def close(self) -> None:
        """Leave in order: Horovod first, MPI after it."""
        if self._has_timeline:
            # Shutting down alone loses the last events.
            hvd.stop_timeline()
        hvd.shutdown()
        if self.kind == "mpi":
            from mpi4py import MPI

            MPI.Finalize()

    def abort(self, exit_code: int) -> None:
        """End every process of the run at once; not collective, never returns."""
        if self.kind == "mpi":
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(exit_code)
        os._exit(exit_code)


def _init_mpi() -> None:
    """MPI before Horovod, so that mpi4py and Horovod share it and we finalize it last."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    provided = MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if provided < MPI.THREAD_MULTIPLE:
        raise UserError(
            f"launch: this MPI gives thread level {provided}, Horovod needs MPI_THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}); load an MPI built with it"
        )


def _ask_mpi() -> tuple[int, int]:
    """Local rank and size: of the ranks that can share memory.

    Collective: yes.
    """
    from mpi4py import MPI

    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    found = host.rank, host.size
    host.Free()
    return found
