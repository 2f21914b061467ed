"""A strategy whose losses and parameters have the same bits on any number of ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import final

import horovod.torch as hvd
import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.data.loader import StepBatch
from hvdlm.data.order import share_of
from hvdlm.parallel import replicated
from hvdlm.parallel.forward import Batch, loss_of, slot_loss
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish
from hvdlm.parallel.tree import Span, partial_spans, push, tree_sum
from hvdlm.parallel.update import Update

_BUCKET_ELEMENTS = 2**22
"""Gradient elements exchanged at a time: 16 MiB of each partial sum."""
_NORM_ELEMENTS = 2**20


@final
class Fixed(Strategy):
    """Every rank holds the model; gradients are summed over slots in one fixed order.

    The gradient of each micro-slot is computed from zero, and those of all slots are added by the
    tree of `hvdlm.parallel.tree`, as are the losses. A rank adds up the nodes that lie within its
    slots; then each rank gets its piece of every rank's partial sums (all-to-all), adds them up, and
    all get all pieces (all-gather). A rank with n partial sums, at most 2 log2(S), sends n + 1
    gradients; where all ranks have the same power of two of slots n is 1, as in an all-reduce. It
    keeps up to n + 1 of them in memory.

    Computes with one thread in each process, because more split sums otherwise, and on a GPU with
    deterministic kernels. The bits still are those of one kind of processor and one torch.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        super().__init__(model, world, plan)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device
        self._update = Update(replicated.optimizer_of(model, plan.optim), plan.optim, plan.precision)
        counts = world.gather_json(plan.slots, name="fixed.slots")
        self._slots = sum(counts)
        self._spans: list[list[Span]] = [
            partial_spans(range(first, end), self._slots)
            for first, end in pairwise(accumulate(counts, initial=0))
        ]
        # Of the partial sums of this rank the k-th; the first one also takes the sum over all ranks.
        self._sums = [self._new_sum()]

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        with _reproducible(self._device):
            return self._step(batch, lr, wish, loss_limit)

    def loss(self, batch: Batch) -> tuple[float, int]:
        with _reproducible(self._device):
            return super().loss(batch)

    def _step(self, batch: StepBatch, lr: float, wish: Callable[[], Wish], loss_limit: float) -> StepStats:
        losses = self._backward(batch)
        statistics = torch.cat((losses, torch.tensor(wish(), dtype=torch.float64)))
        # Each loss is one rank's and zero on the others, so the order of ranks changes no bit.
        self._world.sum_(statistics, name="step.statistics")
        self._sum_over_ranks_()
        self._gradients_go_to_(self._sums[0])
        leaves = [(slot, slot + 1) for slot in range(self._slots)]
        loss = tree_sum(statistics[: self._slots].tolist(), leaves, self._slots)
        norm, skipped = self._update.apply_([self._sums[0]], self._norm(), lr, allowed=loss < loss_limit)
        agreed = Wish(*(statistics[self._slots :] > 0).tolist())
        return StepStats(loss, batch.label_count, norm, skipped, agreed)

    def pieces(self) -> Iterator[Piece]:
        return replicated.pieces(replicated.tensors(self._model, self._update), self._world)

    def whole(self) -> Mapping[str, torch.Tensor]:
        return replicated.tensors(self._model, self._update)

    def load(self, read: Read) -> None:
        replicated.load_(replicated.tensors(self._model, self._update), self._update, read)

    def _backward(self, batch: StepBatch) -> torch.Tensor:
        """Fill this rank's partial sums; its slots' losses, float64 [S] with zeros elsewhere."""
        self._model.train()
        losses = torch.zeros(self._slots, dtype=torch.float64, device=self._device)
        spans: list[Span] = []
        for slot in batch.slots:
            if len(spans) == len(self._sums):
                self._sums.append(self._new_sum())
            self._gradients_go_to_(self._sums[len(spans)].zero_())
            loss = slot_loss(
                loss_of(self._model), slot, batch.label_count, device=self._device, precision=self._precision
            )
            loss.backward()
            losses[slot.index] = loss.detach()
            top = len(spans)
            for _ in range(push(spans, (slot.index, slot.index + 1), self._slots)):
                self._sums[top - 1] += self._sums[top]
                top -= 1
        return losses.cpu()

    def _sum_over_ranks_(self) -> None:
        """Make the first sum that of all slots, the same on all ranks."""
        rank, size = self._world.rank, self._world.size
        if size == 1:
            return
        spans = [span for of_rank in self._spans for span in of_rank]
        own = self._sums[: len(self._spans[rank])]
        for start in range(0, self._sums[0].numel(), _BUCKET_ELEMENTS):
            total = self._sums[0][start : start + _BUCKET_ELEMENTS]
            pieces = [share_of(total.numel(), (r, size)) for r in range(size)]
            rows = [values[start : start + _BUCKET_ELEMENTS] for values in own]
            sent = [row[piece.start : piece.stop] for piece in pieces for row in rows]
            received, _ = hvd.alltoall(
                torch.cat(sent) if sent else total[:0],
                splits=torch.tensor([len(rows) * len(piece) for piece in pieces], dtype=torch.int32),
                name=f"fixed.parts.{start}",
            )
            partial_sums = received.view(len(spans), len(pieces[rank]))
            piece_sum: torch.Tensor = tree_sum(partial_sums, spans, self._slots)
            total.copy_(hvd.allgather(piece_sum, name=f"fixed.sums.{start}"))

    def _norm(self) -> float:
        """Norm of the sum, in blocks of a fixed size."""
        blocks = self._sums[0].split(_NORM_ELEMENTS)
        norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _gradients_go_to_(self, flat: torch.Tensor) -> None:
        parts = flat.split([p.numel() for p in self._parameters])
        for p, part in zip(self._parameters, parts, strict=True):
            p.grad = part.view_as(p)

    def _new_sum(self) -> torch.Tensor:
        """Zeros for the gradients of all parameters, one after the other, float32 [elements]."""
        return torch.zeros(sum(p.numel() for p in self._parameters), device=self._device)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """One thread; on a GPU also kernels whose sums have one order."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    if device.type == "cuda":
        # cuBLAS reads it at its first use in the process.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
