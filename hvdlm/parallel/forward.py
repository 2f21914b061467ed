"""A model's forward pass on one micro-batch: where it runs, in which precision, with which dropout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias, cast

import torch
from torch import nn

from hvdlm.data.loader import Slot

Batch: TypeAlias = dict[str, torch.Tensor]
Loss: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def loss_of(model: nn.Module) -> Loss:
    """A model's `loss(**batch) -> (sum, count)`."""
    return cast(Loss, model.loss)


def slot_loss(
    loss: Loss, slot: Slot, label_count: int, *, device: torch.device, precision: str
) -> torch.Tensor:
    """One micro-slot's part of the mean loss of its global batch, scalar fp32, ready for backward.

    Args:
        loss: `loss(**batch) -> (sum, count)`.
        slot: the micro-batch, and the seed of its dropout.
        label_count: labels of the whole global batch.
        device: where the model is.
        precision: 'fp32', or 'bf16' or 'fp16' for autocast over fp32 weights.
    """
    seed_(device, slot.rng_seed)
    with autocast(device, precision):
        total, _ = loss(**to_device(slot.batch, device))
    return total / label_count


def evaluate(model: nn.Module, batch: Batch, *, precision: str) -> tuple[float, int]:
    """Loss sum in nats and label count of one batch, on the model's device, without dropout.

    Collective: no.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        total, count = loss_of(model)(**to_device(batch, device))
    return float(total), int(count)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch where the model is."""
    if device.type == "cuda":
        # From other memory a copy waits for everything that the GPU was given before.
        batch = {name: values.pin_memory() for name, values in batch.items()}
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def seed_(device: torch.device, seed: int) -> None:
    """Seed the random numbers that a forward pass on `device` draws.

    Not `torch.manual_seed`: where CUDA is not in use it formats a stack trace for later, every time.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute precision of a forward pass: nothing for fp32, else torch's autocast."""
    return torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES)
