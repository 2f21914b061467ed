"""The update as the host decides it, and as a GPU does before the host has read anything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvdlm.config import OptimConfig
from hvdlm.parallel.update import Update, new_optimizer

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def started(device: str, *, kind: str, clip: float, precision: str) -> tuple[list[nn.Parameter], Update]:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((8, 4), (5,))
    ]
    optim = OptimConfig(kind=kind, clip=clip, lr=0.01)  # type: ignore[arg-type]
    optimizer = new_optimizer([(p, p.dim() >= 2) for p in parameters], optim)
    return parameters, Update(optimizer, optim, precision)


def gradients_(parameters: list[nn.Parameter], update: Update, step: int, *, factor: float) -> torch.Tensor:
    """Gives the parameters gradients of a scaled loss; their norm."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device) * factor * update.scale
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_what_is_not_read_first_does_the_same(kind: str, clip: float, precision: str, device: str) -> None:
    """Steps with small and large gradients, one that is not finite, and one that is not allowed."""
    here, read = started("cpu", kind=kind, clip=clip, precision=precision)
    there, unread = started(device, kind=kind, clip=clip, precision=precision)
    for step, (factor, allowed) in enumerate([(0.01, True), (9.0, True), (math.inf, True), (1.0, False)] * 2):
        norm = float(gradients_(here, read, step, factor=factor))
        gradients = [p.grad for p in here if p.grad is not None]
        expected = read.apply_(gradients, norm, 0.01, allowed=allowed)
        own = gradients_(there, unread, step, factor=factor)
        if device == "cpu":
            unread._step_unread_(own, torch.tensor(allowed))
            found = expected
            if unread._scale is not None and read._scale is not None:
                unread._scale.copy_(read._scale)
        else:
            allows = torch.tensor(allowed, device=device)
            found = unread.apply_([], own, 0.01, allowed=allows)
        assert found[1] is expected[1] is (not allowed or not math.isfinite(factor))
        assert found[0] == pytest.approx(expected[0], nan_ok=True)
        assert unread.scale == read.scale
        for mine, theirs in zip(there, here, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs)
            for key, moments in read.moments(theirs).items():
                torch.testing.assert_close(unread.moments(mine)[key].cpu(), moments)
        for key, count in read.counters().items():
            assert torch.equal(unread.counters()[key].cpu(), count)
