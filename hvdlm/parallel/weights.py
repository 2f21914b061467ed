"""A model's weights on all ranks: how they start equal, and how it is seen whether they still are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from torch import nn

from hvdlm.comm.world import World

_BROADCAST_ELEMENTS = 2**26


def broadcast_model_(model: nn.Module, world: World) -> None:
    """Rank 0's parameters and persistent buffers on all ranks, in flat pieces.

    Never `hvd.broadcast_optimizer_state`: it takes a real optimizer step on ranks without state,
    so that weight decay moves their parameters (measured with 0.28.1).

    Collective: yes.
    """
    values = [t.data for t in model.state_dict().values()]
    for dtype in sorted({t.dtype for t in values}, key=str):
        _broadcast_flat_([t for t in values if t.dtype == dtype], world, f"model.{dtype}")


def _broadcast_flat_(values: list[torch.Tensor], world: World, name: str) -> None:
    for i, chunk in enumerate(_chunks(values, _BROADCAST_ELEMENTS)):
        flat = world.broadcast_(torch.cat([t.reshape(-1) for t in chunk]), name=f"{name}.{i}")
        for t, part in zip(chunk, flat.split([t.numel() for t in chunk]), strict=True):
            t.copy_(part.view_as(t))


def digest(model: nn.Module) -> int:
    """xxh3 of all parameters in name order, 64 bits."""
    h = xxhash.xxh3_64()
    for _, values in sorted(model.state_dict().items()):
        h.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.intdigest()


def _chunks(values: list[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Neighbors together while they stay under `limit` elements."""
    chunk: list[torch.Tensor] = []
    elements = 0
    for t in values:
        if chunk and elements + t.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(t)
        elements += t.numel()
    if chunk:
        yield chunk
