"""Training state that every rank holds whole: how it starts equal, is saved and is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
import xxhash
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig
from hvdlm.parallel.strategy import Piece, Read
from hvdlm.parallel.update import Update, new_optimizer

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Live tensors by their canonical names."""

_BROADCAST_ELEMENTS = 2**26


def optimizer_of(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of a model's parameters, which decays its matrices."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return new_optimizer([p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2], optim)


def tensors(model: nn.Module, update: Update) -> dict[str, torch.Tensor]:
    """A model and its optimizer's state, where that is held parameter by parameter."""
    found = {f"model.{name}": values for name, values in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found |= {f"optim.{key}.{name}": values for key, values in update.moments(p).items()}
    return found | update.counters()


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


def pieces(state: Tensors, world: World) -> Iterator[Piece]:
    """This rank's part of a replicated state: whole tensors, dealt out by their sizes."""
    for name in owned(state, world):
        values = state[name]
        yield Piece(name, tuple(values.shape), (0,) * values.dim(), values)


def owned(state: Tensors, world: World) -> list[str]:
    """Names this rank writes: each tensor goes to the rank with the fewest bytes so far."""
    load = [0] * world.size
    mine = []
    for name in sorted(state, key=lambda n: (-state[n].numel(), n)):
        rank = load.index(min(load))
        load[rank] += state[name].numel()
        if rank == world.rank:
            mine.append(name)
    return mine


def load_(state: Tensors, update: Update, read: Read) -> None:
    """Fill a replicated state from a checkpoint.

    Raises:
        KeyError: a tensor was not saved.
    """
    with torch.no_grad():
        for name, values in state.items():
            shape = tuple(values.shape)
            values.copy_(read(name, (0,) * values.dim(), shape, shape))
        update.load_(read)


def digest(model: nn.Module) -> int:
    """62 bits of the xxh3 of all parameters in name order."""
    h = xxhash.xxh3_64()
    for _, values in sorted(model.state_dict().items()):
        h.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.intdigest() >> 2


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
