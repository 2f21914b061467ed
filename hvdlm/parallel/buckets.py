"""Flat gradients in buckets, each summed over all ranks while backward goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import final

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig, ParallelConfig
from hvdlm.data.loader import StepBatch
from hvdlm.parallel import replicated, wire
from hvdlm.parallel.backward import FlatBackward
from hvdlm.parallel.flat import flatten_
from hvdlm.parallel.forward import Batch, evaluate
from hvdlm.parallel.strategy import Piece, Read, StepStats, Strategy, Wish, agree
from hvdlm.parallel.update import Update, new_optimizer


@final
class Buckets(Strategy):
    """Every rank holds the model; its parameters and gradients lie in a few flat tensors.

    A bucket of gradients is sent as one tensor, in place, as soon as the last micro-slot's backward
    pass has finished it; norm, clipping and optimizer work on whole buckets.

    Args:
        model: an `nn.Module` with `loss(**batch) -> (sum, count)`, on its device; its parameters
            become views of the buckets.
        world: the ranks of this run.
        optim: the optimizer's section.
        parallel: precision on the wire and size of the buckets.
        precision: 'fp32', or 'bf16' or 'fp16' (autocast over fp32 weights).
        slots: has no part: a step has as many slots as its batch.

    Collective: construction broadcasts rank 0's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: str,
        slots: int,
    ) -> None:
        self._model = model
        self._world = world
        self._precision = precision
        self._wire = parallel.compression
        replicated.broadcast_model_(model, world)
        self._buckets = flatten_(model, bucket_bytes=int(parallel.bucket_mb * 2**20), multiple=world.size)
        flat = [nn.Parameter(bucket.values) for bucket in self._buckets]
        for p, bucket in zip(flat, self._buckets, strict=True):
            p.grad = bucket.gradients
        decayed = [p for p, bucket in zip(flat, self._buckets, strict=True) if bucket.is_decayed]
        others = [p for p, bucket in zip(flat, self._buckets, strict=True) if not bucket.is_decayed]
        self._update = Update(new_optimizer(decayed, others, optim), optim, precision)
        self._state = self._tensors(flat)
        self._backward = FlatBackward(model, self._buckets, precision=precision)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        pending: list[wire.Pending] = []
        own_loss = self._backward.run(batch, scale=self._update.scale, done=partial(self._send, pending))
        loss, agreed = agree(self._world, own_loss, wish())
        wire.finish_sums(pending, wire=self._wire, world=self._world, name="buckets")
        gradients = [bucket.gradients for bucket in self._buckets]
        norm = float(nn.utils.get_total_norm(gradients))
        norm, skipped = self._update.apply_(gradients, norm, lr, allowed=loss < loss_limit)
        torch._foreach_zero_(gradients)
        return StepStats(loss, batch.label_count, norm, skipped, agreed)

    def loss(self, batch: Batch) -> tuple[float, int]:
        return evaluate(self._model, batch, precision=self._precision)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(self._state, self._world)

    def load(self, read: Read) -> None:
        replicated.load_(self._state, self._update, read)

    def digest(self) -> int:
        return replicated.digest(self._model)

    def _send(self, pending: list[wire.Pending], index: int) -> None:
        if self._world.size > 1:
            gradients = self._buckets[index].gradients
            name = f"buckets.{index}"
            pending.append(wire.begin_sum(gradients, wire=self._wire, world=self._world, name=name))

    def _tensors(self, flat: list[nn.Parameter]) -> dict[str, torch.Tensor]:
        """Live tensors by their canonical names."""
        state = {f"model.{name}": values for name, values in self._model.state_dict().items()}
        for p, bucket in zip(flat, self._buckets, strict=True):
            for key, moments in self._update.moments(p).items():
                views = bucket.views(moments)
                state |= {f"optim.{key}.{name}": values for name, values in views.items()}
        return state | self._update.counters()
