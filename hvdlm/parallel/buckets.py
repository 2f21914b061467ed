"""Flat gradients in buckets, each summed over all ranks while backward goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import final

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.data.loader import StepBatch
from hvdlm.parallel import replicated, wire
from hvdlm.parallel.backward import FlatBackward
from hvdlm.parallel.flat import flatten_
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish, agree
from hvdlm.parallel.update import Update, new_optimizer


@final
class Buckets(Strategy):
    """Every rank holds the model; its parameters and gradients lie in a few flat tensors.

    A bucket of gradients is sent as one tensor, in place, as soon as the last micro-slot's backward
    pass has finished it; norm, clipping and optimizer work on whole buckets.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        super().__init__(model, world, plan)
        self._wire = plan.parallel.compression
        self._buckets = flatten_(model, bucket_mb=plan.parallel.bucket_mb, multiple=world.size)
        flat = [nn.Parameter(bucket.values) for bucket in self._buckets]
        for p, bucket in zip(flat, self._buckets, strict=True):
            p.grad = bucket.gradients
        decays = [bucket.is_decayed for bucket in self._buckets]
        optimizer = new_optimizer(zip(flat, decays, strict=True), plan.optim)
        self._update = Update(optimizer, plan.optim, plan.precision)
        self._state = self._tensors(flat)
        self._backward = FlatBackward(model, self._buckets, precision=plan.precision)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        pending: list[wire.Pending] = []
        own_loss = self._backward.run(batch, scale=self._update.scale, done=partial(self._send, pending))
        loss, agreed = agree(self._world, own_loss, wish)
        wire.finish_sums(pending, wire=self._wire, world=self._world, name="buckets")
        gradients = [bucket.gradients for bucket in self._buckets]
        reduced = nn.utils.get_total_norm(gradients)
        norm, skipped = self._update.apply_(gradients, reduced, lr, allowed=loss < loss_limit)
        torch._foreach_zero_(gradients)
        return StepStats(float(loss), batch.label_count, norm, skipped, agreed)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(self._state, self._world)

    def whole(self) -> Mapping[str, torch.Tensor]:
        return self._state

    def load(self, read: Read) -> None:
        replicated.load_(self._state, self._update, read)

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
