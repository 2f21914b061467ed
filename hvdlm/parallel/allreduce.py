"""The default strategy: `hvd.DistributedOptimizer` around a fused optimizer of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import final

import horovod.torch as hvd
import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.data.loader import StepBatch
from hvdlm.parallel import replicated
from hvdlm.parallel.forward import loss_of, slot_loss
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish, agree
from hvdlm.parallel.update import Update


@final
class AllReduce(Strategy):
    """Every rank holds the model; Horovod sums the gradients of all slots while backward runs.

    Each slot's loss sum is divided by the label count of the *global* batch before its backward
    pass, and the reduction is Sum: ranks with more, fewer or no slots weigh right, and nothing is
    rescaled afterwards.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        super().__init__(model, world, plan)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._optimizer = hvd.DistributedOptimizer(
            replicated.optimizer_of(model, plan.optim),
            named_parameters=[(f"grad.{n}", p) for n, p in model.named_parameters()],
            op=hvd.Sum,
            compression=hvd.Compression.fp16 if plan.parallel.compression == "fp16" else hvd.Compression.none,
            backward_passes_per_step=max(1, plan.slots),
            groups=_fusion_groups(self._parameters, plan.parallel.fusion_mb * 2**20),
        )
        self._update = Update(self._optimizer, plan.optim, plan.precision)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        loss, agreed = agree(self._world, self._backward(batch), wish)
        self._optimizer.synchronize()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        reduced = nn.utils.get_total_norm(gradients)
        with self._optimizer.skip_synchronize():
            norm, skipped = self._update.apply_(gradients, reduced, lr, allowed=loss < loss_limit)
        # Plain: the wrapped optimizer's zero_grad takes no argument.
        self._optimizer.zero_grad()
        return StepStats(float(loss), batch.label_count, norm, skipped, agreed)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(replicated.tensors(self._model, self._update), self._world)

    def whole(self) -> Mapping[str, torch.Tensor]:
        return replicated.tensors(self._model, self._update)

    def load(self, read: Read) -> None:
        replicated.load_(replicated.tensors(self._model, self._update), self._update, read)

    def _backward(self, batch: StepBatch) -> torch.Tensor:
        """This rank's part of the mean loss, 0-d; its gradients are on their way when this returns."""
        self._model.train()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for slot in batch.slots:
            loss = slot_loss(
                loss_of(self._model), slot, batch.label_count, device=self._device, precision=self._precision
            )
            (loss * self._update.scale).backward()
            total += loss.detach()
        if not batch.slots:
            # An idle rank joins the grouped all-reduces with zeros, through the same hooks.
            torch.autograd.backward([(p * 0).sum() for p in self._parameters])
        return total


def _fusion_groups(parameters: list[nn.Parameter], limit_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters in the order their gradients appear, in groups that are fused as one.

    Left to itself Horovod fuses what happens to be ready together; then the order of summation,
    and with three ranks or more the bits, differ from run to run.
    """
    groups: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in reversed(parameters):
        if groups[-1] and size + 4 * p.numel() > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += 4 * p.numel()
    return groups
