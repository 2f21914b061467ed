"""Sums of flat fp32 tensors over all ranks, in the precision of the wire.

Horovod reduces fp32 and fp16, but no bf16. What it moves without reducing may have any bits, so a
bf16 sum is made of two exchanges: each rank gets its part of every rank's values (all-to-all), adds
them up in fp32, and sends the rounded sum to all (all-gather): as many bytes as a ring all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import horovod.torch as hvd
import torch

from hvdlm.comm.world import World

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Pending:
    """A collective that is under way.

    Attributes:
        values: fp32, what is summed or filled.
        handle: Horovod's.
        sent: what is on the wire; Horovod may read it until the end.
    """

    values: torch.Tensor
    handle: int
    sent: torch.Tensor


def begin_sum(values: torch.Tensor, *, wire: str, world: World, name: str) -> Pending:
    """Begin to sum a tensor over all ranks, in place.

    Args:
        values: fp32 [elements], contiguous; elements must be a multiple of the ranks for bf16.
        wire: 'none' (fp32), 'fp16' (summed in fp16) or 'bf16' (summed in fp32, rounded twice).
        world: all ranks.
        name: of the operation.

    Collective: yes; the end is `finish_sums`.
    """
    if wire == "bf16":
        return begin_reduce_scatter(values, wire=wire, world=world, name=name)
    sent = values if wire == "none" else values.to(_HALVES[wire])
    return Pending(values, hvd.allreduce_async_(sent, op=hvd.Sum, name=name), sent)


def finish_sums(pending: list[Pending], *, wire: str, world: World, name: str) -> None:
    """Wait for all sums that were begun; each is the same on all ranks.

    Collective: yes.
    """
    if wire == "bf16":
        gathers = []
        for i, one in enumerate(pending):
            own = finish_reduce_scatter(one, wire=wire, world=world)
            gathers.append(begin_gather(own, one.values, wire=wire, name=f"{name}.gather.{i}"))
        for one in gathers:
            finish_gather(one, wire=wire)
        return
    for one in pending:
        hvd.synchronize(one.handle)
        if one.sent is not one.values:
            one.values.copy_(one.sent)


def begin_reduce_scatter(values: torch.Tensor, *, wire: str, world: World, name: str) -> Pending:
    """Begin to sum a tensor over all ranks, of which rank r wants the r-th part of equal length.

    Args: as of `begin_sum`; elements must be a multiple of the ranks.

    Collective: yes; the end is `finish_reduce_scatter`.
    """
    if wire == "bf16":
        sent = values.to(torch.bfloat16)
        splits = torch.full((world.size,), values.numel() // world.size, dtype=torch.int32)
        return Pending(values, hvd.alltoall_async(_bits(sent), splits=splits, name=name), sent)
    sent = values if wire == "none" else values.to(_HALVES[wire])
    return Pending(values, hvd.reducescatter_async(sent, op=hvd.Sum, name=name), sent)


def finish_reduce_scatter(pending: Pending, *, wire: str, world: World) -> torch.Tensor:
    """This rank's part of the sum, fp32 [elements / ranks]."""
    received = hvd.synchronize(pending.handle)
    if wire == "bf16":
        # With the received split sizes, which are all the same here.
        parts = received[0].view(torch.bfloat16).view(world.size, -1)
        return torch.sum(parts, dim=0, dtype=torch.float32)
    return received.float()


def begin_gather(own: torch.Tensor, values: torch.Tensor, *, wire: str, name: str) -> Pending:
    """Begin to fill a tensor with every rank's part of it, one after the other.

    Args:
        own: fp32 [elements / ranks], this rank's.
        values: fp32 [elements].
        wire: 'bf16' rounds what is sent, and what this rank keeps of its own.
        name: of the operation.

    Collective: yes; the end is `finish_gather`.
    """
    sent = _bits(own.to(torch.bfloat16)) if wire == "bf16" else own
    return Pending(values, hvd.allgather_async(sent, name=name), sent)


def finish_gather(pending: Pending, *, wire: str) -> None:
    """Wait until the tensor is filled; it is the same on all ranks."""
    received = hvd.synchronize(pending.handle)
    pending.values.copy_(received.view(torch.bfloat16) if wire == "bf16" else received)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """bf16 under the name of a type that Horovod knows; moving keeps the bits."""
    return values.view(torch.float16)
