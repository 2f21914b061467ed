"""Mean loss over a fixed set of batches, summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hvdlm.comm.world import World

Batch = dict[str, torch.Tensor]


def mean_loss(
    loss: Callable[[Batch], tuple[float, int]], batches: Iterable[Batch], world: World
) -> tuple[float, int]:
    """Loss per label over the batches of all ranks.

    Args:
        loss: gives the loss sum in nats and the label count of one batch.
        batches: this rank's share.
        world: the ranks that hold the other shares.

    Returns:
        Mean loss in nats and the number of labels, equal on all ranks.

    Collective: yes.
    """
    # The losses are float32, so that float64 holds their sum exactly, in any order, unless they lie
    # further apart than 29 bits.
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sums += torch.tensor(loss(batch), dtype=torch.float64)
    world.sum_(sums, name="evaluation.sums")
    return float(sums[0] / sums[1]), int(sums[1])
