"""What follows the reduction of the gradients: unscale, clip, and update the parameters or skip."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import nn

from hvdlm.config import OptimConfig
from hvdlm.parallel.strategy import Read

_MOMENTS = {
    "adamw": {"m": "exp_avg", "v": "exp_avg_sq"},
    "adam": {"m": "exp_avg", "v": "exp_avg_sq"},
    "sgd": {"m": "momentum_buffer"},
}
_FIRST_SCALE = 2.0**16
_GROWTH_STEPS = 2000


def new_optimizer(
    parameters: Iterable[tuple[nn.Parameter, bool]], optim: OptimConfig
) -> torch.optim.Optimizer:
    """torch's optimizer `optim.kind`, fused.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019 (adamw); Kingma and Ba,
    Adam, 2015. Of adam and sgd the decay is an L2 penalty.

    Args:
        parameters: each with whether weight decay is for it.
        optim: the section.
    """
    pairs = list(parameters)
    groups = [
        {"params": [p for p, decays in pairs if decays], "weight_decay": optim.weight_decay},
        {"params": [p for p, decays in pairs if not decays], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    kind = torch.optim.Adam if optim.kind == "adam" else torch.optim.AdamW
    return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


@final
class Update:
    """The optimizer, and when it may not step; the same decisions on all ranks.

    A step is skipped where the norm of the reduced gradient is not finite. With fp16 the loss is
    multiplied by `scale` before backward, so that small gradients do not vanish; a skipped step
    halves it and 2,000 steps without one double it. torch's GradScaler decides by the gradients that
    one process sees, of which a rank with a share of them sees too few.

    Source: Micikevicius et al., Mixed Precision Training, 2018, and the constants of `torch.amp.GradScaler`.

    Args:
        optimizer: steps the parameters; its state is allocated here, so that it can be saved and
            loaded at any time. `hvd.DistributedOptimizer` does not take over the state of the one
            it wraps, so it is the wrapper that belongs here.
        optim: gradient clipping and the optimizer's kind.
        precision: 'fp16' makes the loss be scaled.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, precision: str) -> None:
        self._optimizer = optimizer
        self._clip = optim.clip
        self._moments = _MOMENTS[optim.kind]
        self._counts: list[torch.Tensor] = []
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = {key: torch.zeros_like(p) for key in self._moments.values()}
            if optim.kind != "sgd":
                self._counts.append(torch.zeros((), dtype=torch.float32, device=p.device))
                optimizer.state[p]["step"] = self._counts[-1]
        # [scale, steps since it changed]
        self._scale = torch.tensor([_FIRST_SCALE, 0.0]) if precision == "fp16" else None

    @property
    def scale(self) -> float:
        """What a loss is multiplied by before its backward pass."""
        return 1.0 if self._scale is None else float(self._scale[0])

    def moments(self, p: nn.Parameter) -> dict[str, torch.Tensor]:
        """The optimizer's tensors for a parameter, of its shape, by their names in checkpoints."""
        return {name: self._optimizer.state[p][key] for name, key in self._moments.items()}

    def counters(self) -> dict[str, torch.Tensor]:
        """Canonical names and live tensors of what is not of a parameter.

        `optim.count` is Adam's step count, which skips do not advance.
        """
        count = {"optim.count": self._counts[0]} if self._counts else {}
        return count if self._scale is None else count | {"optim.scale": self._scale}

    def load_(self, read: Read) -> None:
        """Fill the counters from a checkpoint."""
        for count in self._counts:
            count.copy_(read("optim.count", (), (), ()))
        if self._scale is not None:
            self._scale.copy_(read("optim.scale", (0,), (2,), (2,)))

    def apply_(
        self,
        gradients: list[torch.Tensor],
        scaled_norm: torch.Tensor | float,
        lr: float,
        *,
        allowed: torch.Tensor | bool,
    ) -> tuple[float, bool]:
        """Cut the gradients to the clipping norm and step, or skip.

        Args:
            gradients: of the scaled loss, summed over all ranks; changed in place.
            scaled_norm: their norm over all ranks; where it is a tensor on a GPU, the update is under way
                before the host reads it.
            lr: learning rate.
            allowed: False skips.

        Returns:
            The norm of the gradient of the loss before clipping, and whether the step was skipped.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        on_gpu = isinstance(scaled_norm, torch.Tensor) and scaled_norm.is_cuda
        if on_gpu:
            self._step_unread_(torch.as_tensor(scaled_norm), allowed)
        norm = float(scaled_norm) / self.scale
        finite = math.isfinite(norm)
        applied = finite and bool(allowed)
        if applied and not on_gpu:
            factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
            if factor != 1 or self.scale != 1:
                torch._foreach_mul_(gradients, factor / self.scale)
            self._optimizer.step()
        if self._scale is not None:
            _adapt_(self._scale, finite)
        return norm, not applied

    def _step_unread_(self, scaled_norm: torch.Tensor, allowed: torch.Tensor | bool) -> None:
        """Cut, and step or skip, all on the device: else it would stand still while the host decides.

        torch's fused optimizers divide the gradients by `grad_scale` as they read them, and change
        nothing, their step counts included, where `found_inf` is 1.
        """
        divisor = torch.full_like(scaled_norm, self.scale)
        if self._clip:
            divisor *= ((scaled_norm / self.scale + 1e-6) / self._clip).clamp(min=1.0)
        applied = torch.isfinite(scaled_norm) & torch.as_tensor(allowed, device=scaled_norm.device)
        self._optimizer.grad_scale, self._optimizer.found_inf = divisor, (~applied).float()  # type: ignore[attr-defined]
        self._optimizer.step()


def _adapt_(scale: torch.Tensor, finite: bool) -> None:
    scale[1] += 1
    if not finite:
        scale[0], scale[1] = scale[0] / 2, 0
    elif scale[1] >= _GROWTH_STEPS:
        scale[0], scale[1] = scale[0] * 2, 0
