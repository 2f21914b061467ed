"""One sum over all ranks by each library that can make it, for comparing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import horovod.torch as hvd
import torch
from torch import distributed as dist

from hvdlm.comm.world import World

Reduction: TypeAlias = Callable[[list[torch.Tensor], str], None]
"""Sums each of some tensors over all ranks in place and returns when all are done; the text names them."""


def reductions(world: World, device: torch.device) -> dict[str, Reduction]:
    """Those that there are in this launch, Horovod's first.

    MPI's own is there where MPI started the ranks and the tensors lie on the CPU; torch's needs the
    group of `torch_group.open_group`.
    """
    found: dict[str, Reduction] = {"horovod": _sum_by_horovod_}
    if world.kind == "mpi" and device.type == "cpu":
        found["mpi"] = _sum_by_mpi_
    if dist.is_initialized():
        found["torch"] = _sum_by_torch_
    return found


def data_plane(world: World, device: torch.device) -> str:
    """The library that moves Horovod's data: 'NCCL', 'MPI' or 'Gloo', as its timeline names them."""
    if device.type == "cuda" and hvd.nccl_built():
        return "NCCL"
    return "MPI" if world.kind == "mpi" and hvd.mpi_enabled() else "Gloo"


def _sum_by_horovod_(tensors: list[torch.Tensor], name: str) -> None:
    handles = [
        hvd.allreduce_async_(values, op=hvd.Sum, name=f"{name}.{i}") for i, values in enumerate(tensors)
    ]
    for handle in handles:
        hvd.synchronize(handle)


def _sum_by_mpi_(tensors: list[torch.Tensor], name: str) -> None:
    from mpi4py import MPI

    for values in tensors:
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values.numpy(), MPI.SUM)


def _sum_by_torch_(tensors: list[torch.Tensor], name: str) -> None:
    works = [dist.all_reduce(values, async_op=True) for values in tensors]
    for work in works:
        if work is not None:
            work.wait()
