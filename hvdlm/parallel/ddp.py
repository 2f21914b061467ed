"""torch's DistributedDataParallel, the usual way to train on many processes, to compare with."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hvdlm.comm.torch_group import open_group
from hvdlm.comm.world import World
from hvdlm.data.loader import Slot, StepBatch
from hvdlm.parallel import replicated
from hvdlm.parallel.forward import loss_of, slot_loss
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish, agree
from hvdlm.parallel.update import Update


@final
class Ddp(Strategy):
    """Every rank holds the model; torch.distributed averages gradients over NCCL or Gloo during backward.

    Horovod carries the statistics. The mean over ranks becomes a sum by the loss's factor.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        super().__init__(model, world, plan)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        open_group(world, self._device)
        with warnings.catch_warnings():
            # Newer releases of torch have another word for broadcast_buffers, older ones only this.
            warnings.simplefilter("ignore", FutureWarning)
            self._losses = DistributedDataParallel(
                _Loss(model),
                bucket_cap_mb=plan.parallel.bucket_mb,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if plan.parallel.compression == "fp16":
            self._losses.register_comm_hook(None, default_hooks.fp16_compress_hook)
        self._update = Update(replicated.optimizer_of(model, plan.optim), plan.optim, plan.precision)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        loss, agreed = agree(self._world, self._backward(batch), wish)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        reduced = nn.utils.get_total_norm(gradients)
        norm, skipped = self._update.apply_(gradients, reduced, lr, allowed=loss < loss_limit)
        torch._foreach_zero_(gradients)
        return StepStats(float(loss), batch.label_count, norm, skipped, agreed)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(replicated.tensors(self._model, self._update), self._world)

    def load(self, read: Read) -> None:
        replicated.load_(replicated.tensors(self._model, self._update), self._update, read)

    def _backward(self, batch: StepBatch) -> torch.Tensor:
        """This rank's part of the mean loss, 0-d; when this returns the gradients are summed."""
        self._model.train()
        factor = self._world.size * self._update.scale
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        slots: list[Slot | None] = [*batch.slots] or [None]
        for slot in slots:
            last = slot is slots[-1]
            with contextlib.nullcontext() if last else self._losses.no_sync():
                loss = self._losses(slot, batch.label_count, self._precision)
                (loss * factor).backward()
            total += loss.detach()
        return total


@final
class _Loss(nn.Module):
    """A slot's loss as a forward pass, which DDP wants to wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, slot: Slot | None, label_count: int, precision: str) -> torch.Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if slot is None:
            # A rank without slots joins the reduction with zeros.
            return torch.stack([(p * 0).sum() for p in parameters]).sum()
        return slot_loss(
            loss_of(self.model), slot, label_count, device=parameters[0].device, precision=precision
        )
