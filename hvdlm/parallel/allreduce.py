"""The default strategy: `hvd.DistributedOptimizer` around fused AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import final

import horovod.torch as hvd
import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig, ParallelConfig
from hvdlm.data.loader import StepBatch
from hvdlm.parallel import replicated
from hvdlm.parallel.strategy import (
    Batch,
    Piece,
    Read,
    StepStats,
    Strategy,
    Wish,
    autocast,
    evaluate,
    loss_of,
    seed_,
    to_device,
)


@final
class AllReduce(Strategy):
    """Every rank holds the model; Horovod sums the gradients of all slots while backward runs.

    Each slot's loss sum is divided by the label count of the *global* batch before its backward
    pass, and the reduction is Sum: ranks with more, fewer or no slots weigh right, and nothing is
    rescaled afterwards.

    Args:
        model: an `nn.Module` with `loss(**batch) -> (sum, count)`, on its device.
        world: the ranks of this run.
        optim: Adam's section.
        parallel: wire compression and fusion size.
        precision: 'fp32' or 'bf16' (autocast over fp32 weights).
        slots: micro-slots of this rank in every step, possibly 0.

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
        self._clip = optim.clip
        self._precision = precision
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        replicated.broadcast_model_(model, world)
        self._optimizer = hvd.DistributedOptimizer(
            replicated.adamw(model, optim),
            named_parameters=[(f"grad.{n}", p) for n, p in model.named_parameters()],
            op=hvd.Sum,
            compression=hvd.Compression.fp16 if parallel.compression == "fp16" else hvd.Compression.none,
            backward_passes_per_step=max(1, slots),
            groups=_fusion_groups(self._parameters, parallel.fusion_mb * 2**20),
        )
        replicated.allocate_state_(self._optimizer)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        loss = self._backward(batch)
        sums = torch.tensor([float(loss), *wish()], dtype=torch.float64)
        self._world.sum_(sums, name="step.statistics")
        self._optimizer.synchronize()
        grad_norm = float(self._clipped_norm_())
        applied = math.isfinite(grad_norm + float(sums[0])) and float(sums[0]) <= loss_limit
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            with self._optimizer.skip_synchronize():
                self._optimizer.step()
        # Plain: the wrapped optimizer's zero_grad takes no argument.
        self._optimizer.zero_grad()
        agreed = Wish(*(sums[1:] > 0).tolist())
        return StepStats(float(sums[0]), batch.label_count, grad_norm, not applied, agreed)

    def loss(self, batch: Batch) -> tuple[float, int]:
        return evaluate(self._model, batch, precision=self._precision)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(self._model, self._optimizer, self._world)

    def load(self, read: Read) -> None:
        replicated.load_(self._model, self._optimizer, read)

    def digest(self) -> int:
        return replicated.digest(self._model)

    def _backward(self, batch: StepBatch) -> torch.Tensor:
        """This rank's part of the mean loss; its gradients are on their way when this returns."""
        self._model.train()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for slot in batch.slots:
            seed_(self._device, slot.rng_seed)
            with autocast(self._device, self._precision):
                loss, _ = loss_of(self._model)(**to_device(slot.batch, self._device))
            loss = loss / batch.label_count
            loss.backward()
            total += loss.detach()
        if not batch.slots:
            # An idle rank joins the grouped all-reduces with zeros, through the same hooks.
            torch.autograd.backward([(p * 0).sum() for p in self._parameters])
        return total

    def _clipped_norm_(self) -> torch.Tensor:
        """Norm of the reduced gradient, which is then cut to `clip`; equal on all ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm


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
