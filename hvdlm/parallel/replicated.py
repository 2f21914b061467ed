"""Model and Adam state that every rank holds whole: how it starts equal, is saved and is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig
from hvdlm.parallel.strategy import Piece, Read

_BROADCAST_ELEMENTS = 2**26


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )


def allocate_state_(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam its state before the first step, so that it can be saved and loaded at any time.

    For the optimizer that takes the steps: `hvd.DistributedOptimizer` does not take over the state
    of the one it wraps.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }


def broadcast_model_(model: nn.Module, world: World) -> None:
    """Rank 0's parameters and persistent buffers on all ranks, in flat pieces.

    Never `hvd.broadcast_optimizer_state`: it takes a real optimizer step on ranks without state,
    so that weight decay moves their parameters (measured with 0.28.1).

    Collective: yes.
    """
    tensors = [t.data for t in model.state_dict().values()]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        _broadcast_flat_([t for t in tensors if t.dtype == dtype], world, f"model.{dtype}")


def _broadcast_flat_(tensors: list[torch.Tensor], world: World, name: str) -> None:
    for i, chunk in enumerate(_chunks(tensors, _BROADCAST_ELEMENTS)):
        flat = world.broadcast_(torch.cat([t.reshape(-1) for t in chunk]), name=f"{name}.{i}")
        for t, values in zip(chunk, flat.split([t.numel() for t in chunk]), strict=True):
            t.copy_(values.view_as(t))


def pieces(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Iterator[Piece]:
    """This rank's part of a replicated state: whole tensors, dealt out by their sizes."""
    tensors = dict(_state(model, optimizer))
    for name in owned(tensors, world):
        values = tensors[name]
        yield Piece(name, tuple(values.shape), (0,) * values.dim(), values)


def owned(tensors: dict[str, torch.Tensor], world: World) -> list[str]:
    """Names this rank writes: each tensor goes to the rank with the fewest bytes so far."""
    load = [0] * world.size
    mine = []
    for name in sorted(tensors, key=lambda n: (-tensors[n].numel(), n)):
        rank = load.index(min(load))
        load[rank] += tensors[name].numel()
        if rank == world.rank:
            mine.append(name)
    return mine


def load_(model: nn.Module, optimizer: torch.optim.Optimizer, read: Read) -> None:
    """Fill a replicated state from a checkpoint.

    Raises:
        KeyError: a tensor was not saved.
    """
    with torch.no_grad():
        for name, values in _state(model, optimizer):
            shape = tuple(values.shape)
            values.copy_(read(name, (0,) * values.dim(), shape, shape))
        count = read("optim.count", (), (), ())
        for state in optimizer.state.values():
            state["step"].copy_(count)


def digest(model: nn.Module) -> int:
    """62 bits of the xxh3 of all parameters in name order."""
    h = xxhash.xxh3_64()
    for _, values in sorted(model.state_dict().items()):
        h.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.intdigest() >> 2


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical names and live tensors; `optim.count` is Adam's step count, which skips do not advance."""
    for name, values in model.state_dict().items():
        yield f"model.{name}", values
    count = None
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield f"optim.m.{name}", optimizer.state[p]["exp_avg"]
            yield f"optim.v.{name}", optimizer.state[p]["exp_avg_sq"]
            count = optimizer.state[p]["step"]
    if count is not None:
        yield "optim.count", count


def _chunks(tensors: list[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Neighbors together while they stay under `limit` elements."""
    chunk: list[torch.Tensor] = []
    elements = 0
    for t in tensors:
        if chunk and elements + t.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(t)
        elements += t.numel()
    if chunk:
        yield chunk
