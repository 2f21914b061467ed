"""Training state that every rank holds whole: its names, and how it is saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig
from hvdlm.parallel.strategy import Piece, Read
from hvdlm.parallel.update import Update, new_optimizer

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Live tensors by their canonical names."""


def optimizer_of(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of a model's parameters, which decays its matrices."""
    return new_optimizer([(p, p.dim() >= 2) for p in model.parameters() if p.requires_grad], optim)


def tensors(model: nn.Module, update: Update) -> dict[str, torch.Tensor]:
    """A model and its optimizer's state, where that is held parameter by parameter."""
    found = {f"model.{name}": values for name, values in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found |= {f"optim.{key}.{name}": values for key, values in update.moments(p).items()}
    return found | update.counters()


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
