"""What every way of training on many processes offers to the loop and to checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import OptimConfig, ParallelConfig
from hvdlm.data.loader import StepBatch
from hvdlm.parallel.forward import Batch, evaluate
from hvdlm.parallel.weights import broadcast_model_, digest


class Read(Protocol):
    """Gives a rectangle of a saved tensor on the CPU.

    `global_shape` is what the whole tensor must have, where the caller knows it; a tensor of another
    shape is a checkpoint of another model. Raises KeyError for a name that was not saved.
    """

    def __call__(
        self,
        name: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        global_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor: ...


class Wish(NamedTuple):
    """What a rank says of itself in a step, or what any rank said.

    Attributes:
        stop: save and leave after this step.
        save: save and go on.
        writing: a checkpoint is still being written.
        resize: leave this world after this step, for one of other ranks.
    """

    stop: bool = False
    save: bool = False
    writing: bool = False
    resize: bool = False


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, equal on all ranks.

    Attributes:
        loss: mean loss over the labels of the global batch, in nats.
        count: labels in the global batch.
        grad_norm: norm of the reduced gradient before clipping.
        skipped: a gradient was not finite or the loss above its limit: nothing was updated on any rank.
        wish: what some rank said in this step.
    """

    loss: float
    count: int
    grad_norm: float
    skipped: bool
    wish: Wish


@dataclass(frozen=True)
class Piece:
    """A rectangle of one tensor of the training state, owned by this rank alone.

    Attributes:
        name: canonical name: `model.*`, `optim.m.*`, `optim.v.*`, `optim.count`, `optim.scale`,
            `extra.STRATEGY.*`.
        global_shape: shape of the whole tensor.
        offset: where this rectangle starts in it.
        values: the rectangle, on any device.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: torch.Tensor


def agree(world: World, loss: torch.Tensor, wish: Callable[[], Wish]) -> tuple[torch.Tensor, Wish]:
    """The loss over all ranks, and what any of them wishes.

    Args:
        world: all ranks.
        loss: this rank's part of the mean loss, 0-d; on a GPU it may still be computed.
        wish: gives this rank's; called when the loss is there, unless there are no others.

    Returns:
        The loss, 0-d; of one rank alone it is where it was, and the host has not waited for it.

    Collective: yes.
    """
    if world.size == 1:
        return loss, wish()
    own_loss = float(loss)
    sums = world.sum_(torch.tensor([own_loss, *wish()], dtype=torch.float64), name="step.statistics")
    return sums[0], Wish(*(sums[1:] > 0).tolist())


@dataclass(frozen=True)
class StepPlan:
    """How this rank takes its steps.

    Attributes:
        optim: the optimizer's section.
        parallel: precision on the wire, and sizes of buckets and of Horovod's fusion.
        precision: 'fp32', or 'bf16' or 'fp16' (autocast over fp32 weights).
        slots: micro-slots of this rank in every step, possibly 0; a rank's follow those of the rank before.
    """

    optim: OptimConfig
    parallel: ParallelConfig
    precision: str
    slots: int


class Strategy(ABC):
    """One optimizer step over many processes, and the training state it keeps.

    The loop does not know how a step is done; a checkpoint does not know how a run was parallel.
    A model and its strategy live for one world; on a resize both are built anew through `load`.

    Args:
        model: an `nn.Module` with `loss(**batch) -> (sum, count)`, on its device; a strategy may move
            its parameters into other memory.
        world: the ranks of this run.
        plan: how steps are done; a strategy may have no use for part of it.

    Collective: construction broadcasts rank 0's weights.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        self._model = model
        self._world = world
        self._precision = plan.precision
        broadcast_model_(model, world)

    @abstractmethod
    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        """Do one optimizer step on this rank's micro-slots of the global batch.

        Args:
            batch: this rank's slots, possibly none, and the label count of the global batch.
            lr: learning rate of this step.
            wish: what this rank asks for; called when the gradients are under way, so that a wish in
                the middle of a step counts for it, and all-reduced with the statistics.
            loss_limit: only a mean loss below it updates anything; equal on all ranks.

        Collective: yes.
        """

    def loss(self, batch: Batch) -> tuple[float, int]:
        """Loss sum in nats and label count of one micro-batch, without gradients or dropout.

        Collective: no.
        """
        return evaluate(self._model, batch, precision=self._precision)

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The part of the training state that this rank owns; every element has one owner.

        Collective: no.
        """

    @abstractmethod
    def load(self, read: Read) -> None:
        """Replace the whole training state.

        Args:
            read: gives rectangles of the saved state.

        Collective: every rank calls it.
        """

    def whole(self) -> Mapping[str, torch.Tensor] | None:
        """The training state by its canonical names, live; None where no rank holds all of it.

        Outside of `step`, and where a collective in it failed, it is that after the last whole step.

        Collective: no.
        """
        return None

    def digest(self) -> int:
        """A 64-bit digest of this rank's parameters, for comparing ranks.

        Collective: no.
        """
        return digest(self._model)
