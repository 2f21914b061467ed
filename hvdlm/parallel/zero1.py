"""ZeRO-1: every rank holds the model and updates its share of it, so that optimizer state is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import final

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.data.loader import StepBatch
from hvdlm.parallel import replicated, wire
from hvdlm.parallel.backward import FlatBackward
from hvdlm.parallel.flat import Bucket, flatten_, own_part, rectangles
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish
from hvdlm.parallel.update import Update, new_optimizer


@final
class Zero1(Strategy):
    """Gradients are reduce-scattered, each rank updates its part of every bucket, parameters are gathered.

    With N ranks the optimizer's state takes 1/N of its memory on each; as many bytes travel as in an
    all-reduce. With bf16 on the wire each rank keeps its part of the parameters in fp32 and all compute
    with the parameters rounded to bf16; what is no matrix always travels in fp32.

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020.
    """

    def __init__(self, model: nn.Module, world: World, plan: StepPlan) -> None:
        super().__init__(model, world, plan)
        self._buckets = flatten_(model, bucket_mb=plan.parallel.bucket_mb, multiple=world.size)
        self._wires = [plan.parallel.compression if b.is_decayed else "none" for b in self._buckets]
        self._owned = [own_part(bucket, world) for bucket in self._buckets]
        self._masters = [self._new_master(index) for index in range(len(self._buckets))]
        decays = [bucket.is_decayed for bucket in self._buckets]
        optimizer = new_optimizer(zip(self._masters, decays, strict=True), plan.optim)
        self._update = Update(optimizer, plan.optim, plan.precision)
        self._backward = FlatBackward(model, self._buckets, precision=plan.precision)

    def step(
        self, batch: StepBatch, lr: float, *, wish: Callable[[], Wish], loss_limit: float = math.inf
    ) -> StepStats:
        pending: dict[int, wire.Pending] = {}
        run = self._backward.run(batch, scale=self._update.scale, done=partial(self._send, pending))
        # Read before the wish, which stops the clock of this rank's own work.
        own_loss, wishes = float(run), wish()
        gradients = self._own_gradients(pending)
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
        squares = float(norms.square().sum())
        sums = torch.tensor([own_loss, squares, *wishes], dtype=torch.float64)
        loss, squares, *flags = self._world.sum_(sums, name="step.statistics").tolist()
        norm, skipped = self._update.apply_(gradients, math.sqrt(squares), lr, allowed=loss < loss_limit)
        if not skipped:
            self._gather_()
        torch._foreach_zero_([bucket.gradients for bucket in self._buckets])
        return StepStats(loss, batch.label_count, norm, skipped, Wish(*(flag > 0 for flag in flags)))

    def pieces(self) -> Iterator[Piece]:
        for bucket, part, master in zip(self._buckets, self._owned, self._masters, strict=True):
            kinds = {"model": master.detach()}
            kinds |= {f"optim.{key}": values for key, values in self._update.moments(master).items()}
            for kind, values in kinds.items():
                yield from _rectangles_of(bucket, part, kind=kind, values=values)
        yield from replicated.pieces(self._small_state(), self._world)

    def load(self, read: Read) -> None:
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(read(f"model.{name}", (0,) * p.dim(), tuple(p.shape), tuple(p.shape)))
            for index, (bucket, part) in enumerate(zip(self._buckets, self._owned, strict=True)):
                master = self._masters[index]
                if self._wires[index] == "bf16":
                    master.copy_(bucket.values[part])
                    bucket.values.copy_(bucket.values.to(torch.bfloat16))
                for key, values in self._update.moments(master).items():
                    for piece in _rectangles_of(bucket, part, kind=f"optim.{key}", values=values):
                        shape = tuple(piece.values.shape)
                        piece.values.copy_(read(piece.name, piece.offset, shape, piece.global_shape))
        replicated.load_(self._small_state(), self._update, read)

    def _new_master(self, index: int) -> nn.Parameter:
        """This rank's part of a bucket as the optimizer's parameter: a view, unless the bucket is rounded."""
        bucket = self._buckets[index]
        part = bucket.values[self._owned[index]]
        if self._wires[index] != "bf16":
            return nn.Parameter(part)
        master = nn.Parameter(part.clone())
        bucket.values.copy_(bucket.values.to(torch.bfloat16))
        return master

    def _send(self, pending: dict[int, wire.Pending], index: int) -> None:
        if self._world.size > 1:
            gradients, kind = self._buckets[index].gradients, self._wires[index]
            pending[index] = wire.begin_reduce_scatter(
                gradients, wire=kind, world=self._world, name=f"zero1.gradients.{index}"
            )

    def _own_gradients(self, pending: dict[int, wire.Pending]) -> list[torch.Tensor]:
        """This rank's part of the summed gradients, which become those of its parameters."""
        for index, master in enumerate(self._masters):
            if index in pending:
                master.grad = wire.finish_reduce_scatter(
                    pending[index], wire=self._wires[index], world=self._world
                )
            else:
                master.grad = self._buckets[index].gradients
        return [master.grad for master in self._masters if master.grad is not None]

    def _gather_(self) -> None:
        """Every rank's updated part of every bucket on all ranks."""
        gathers = []
        for index, master in enumerate(self._masters):
            kind, values = self._wires[index], self._buckets[index].values
            if self._world.size > 1:
                own, name = master.detach(), f"zero1.parameters.{index}"
                gathers.append((wire.begin_gather(own, values, wire=kind, name=name), kind))
            elif kind == "bf16":
                values.copy_(master.detach().to(torch.bfloat16))
        for pending, kind in gathers:
            wire.finish_gather(pending, wire=kind)

    def _small_state(self) -> dict[str, torch.Tensor]:
        """What every rank holds whole: what is not trained, and the counters."""
        trained = {name for name, p in self._model.named_parameters() if p.requires_grad}
        rest = {f"model.{n}": v for n, v in self._model.state_dict().items() if n not in trained}
        return rest | self._update.counters()


def _rectangles_of(bucket: Bucket, part: slice, *, kind: str, values: torch.Tensor) -> Iterator[Piece]:
    """A rank's part of a bucket, cut into rectangles of its parameters.

    Args:
        bucket: says which parameter lies where.
        part: of the bucket.
        kind: what stands before a parameter's name.
        values: fp32 [length of the part].
    """
    for place in bucket.places:
        shape = tuple(place.parameter.shape)
        first, end = max(place.start, part.start), min(place.end, part.stop)
        for cut in rectangles(shape, first - place.start, end - place.start):
            start = place.start + cut.start - part.start
            flat = values[start : start + math.prod(cut.shape)]
            yield Piece(f"{kind}.{place.name}", shape, cut.offset, flat.view(cut.shape))
