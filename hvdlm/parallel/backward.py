"""A step's forward and backward passes over flat buckets of gradients, which says when each is finished."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

import torch
from torch import nn

from hvdlm.data.loader import StepBatch
from hvdlm.parallel.flat import Bucket
from hvdlm.parallel.forward import loss_of, slot_loss


@final
class FlatBackward:
    """Sums the gradients of a rank's micro-slots in its buckets.

    Hooks count down the parameters of each bucket during the last slot's backward pass. They stay
    on the model for good, as Horovod's do: a model and what is built on it live for one world.

    Args:
        model: an `nn.Module` with `loss(**batch) -> (sum, count)`.
        buckets: hold its trained parameters.
        precision: 'fp32', 'bf16' or 'fp16'.
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], *, precision: str) -> None:
        self._model = model
        self._buckets = buckets
        self._precision = precision
        self._waiting = [0] * len(buckets)
        self._done: Callable[[int], None] | None = None
        for index, bucket in enumerate(buckets):
            for place in bucket.places:
                place.parameter.register_post_accumulate_grad_hook(partial(self._count_down, index))

    def run(self, batch: StepBatch, *, scale: float, done: Callable[[int], None]) -> torch.Tensor:
        """Add the gradients of the scaled mean loss to the buckets.

        Args:
            batch: this rank's micro-slots, possibly none.
            scale: of the loss.
            done: called with a bucket's index once its gradients are complete, for each exactly once.

        Returns:
            This rank's part of the mean loss, 0-d; on a GPU it may still be computed.
        """
        self._model.train()
        device = self._buckets[0].values.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        self._waiting = [len(bucket.places) for bucket in self._buckets]
        loss_function = loss_of(self._model)
        for slot in batch.slots:
            loss = slot_loss(loss_function, slot, batch.label_count, device=device, precision=self._precision)
            self._done = done if slot is batch.slots[-1] else None
            (loss * scale).backward()
            total += loss.detach()
        self._done = None
        # What no slot reached: a parameter without a part in the loss, or a rank without slots.
        for index, waiting in enumerate(self._waiting):
            if waiting:
                done(index)
        return total

    def _count_down(self, index: int, _: torch.Tensor) -> None:
        if self._done is None:
            return
        self._waiting[index] -= 1
        if self._waiting[index] == 0:
            self._done(index)
