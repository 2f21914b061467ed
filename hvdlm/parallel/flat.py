"""Parameters and gradients in flat buckets, in the order in which backward finishes them.

A bucket is one tensor of parameters and one of gradients, of which the model's parameters and their
`.grad` are views: one collective and one optimizer kernel do a whole bucket, without copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.data.order import share_of

_ALIGN_ELEMENTS = 32
"""Parameters begin at multiples of 128 bytes, as vector instructions like it; gaps stay zero."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its bucket: [start, start + numel)."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def end(self) -> int:
        """First element behind it."""
        return self.start + self.parameter.numel()


@dataclass(frozen=True)
class Bucket:
    """Neighbors in one flat tensor.

    Attributes:
        places: what lies where.
        values: fp32 [elements], the parameters.
        gradients: fp32 [elements].
        is_decayed: matrices, which weight decay is for.
    """

    places: list[Place]
    values: torch.Tensor
    gradients: torch.Tensor
    is_decayed: bool

    def point_gradients_here_(self) -> None:
        """Make the parameters' gradients views of this bucket's."""
        for place in self.places:
            place.parameter.grad = self.gradients[place.start : place.end].view_as(place.parameter)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor laid out like this bucket, parameter by parameter."""
        return {p.name: flat[p.start : p.end].view_as(p.parameter) for p in self.places}


def flatten_(model: nn.Module, *, bucket_mb: float, multiple: int = 1) -> list[Bucket]:
    """Move a model's trained parameters into buckets, matrices first, each kind from the last to the first.

    Args:
        model: on its device; its parameters become views.
        bucket_mb: MiB; a bucket is closed before it grows beyond, a larger parameter has one of its own.
        multiple: a bucket's length is a multiple of it.
    """
    trained = [(name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad]
    buckets = []
    for is_decayed in (True, False):
        kind = [(name, p) for name, p in trained if (p.dim() >= 2) == is_decayed]
        for group in _groups(kind, int(bucket_mb * 2**20) // 4):
            buckets.append(_bucket(group, is_decayed=is_decayed, multiple=multiple))
    return buckets


def _groups(named: list[tuple[str, nn.Parameter]], limit: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    group: list[tuple[str, nn.Parameter]] = []
    elements = 0
    for name, p in named:
        if group and elements + p.numel() > limit:
            yield group
            group, elements = [], 0
        group.append((name, p))
        elements += p.numel()
    if group:
        yield group


def _bucket(named: list[tuple[str, nn.Parameter]], *, is_decayed: bool, multiple: int) -> Bucket:
    places, end = [], 0
    for name, p in named:
        places.append(Place(name, p, end))
        end += _round_up(p.numel(), _ALIGN_ELEMENTS)
    values = torch.zeros(_round_up(end, multiple * _ALIGN_ELEMENTS), device=named[0][1].device)
    bucket = Bucket(places, values, torch.zeros_like(values), is_decayed)
    for place, view in zip(places, bucket.views(values).values(), strict=True):
        view.copy_(place.parameter.data)
        place.parameter.data = view
    bucket.point_gradients_here_()
    return bucket


def own_part(bucket: Bucket, world: World) -> slice:
    """This rank's share of a bucket, of the same length on all ranks that share it evenly."""
    share = share_of(bucket.values.numel(), (world.rank, world.size))
    return slice(share.start, share.stop)


@dataclass(frozen=True)
class Rectangle:
    """Part of a tensor that is contiguous in memory: its offset and shape, and where it starts."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[Rectangle]:
    """Cut the elements [start, end) of a tensor in row-major order into as few rectangles as there are.

    A matrix gives three at most: the rest of a row, whole rows, the begin of one.
    """
    if start >= end:
        return
    if not shape:
        yield Rectangle((), (), start)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        yield from _within_row(shape, start, end)
        return
    yield from _within_row(shape, start, first * row)
    if first < last:
        yield Rectangle((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]), first * row)
    yield from _within_row(shape, last * row, end)


def _within_row(shape: tuple[int, ...], start: int, end: int) -> Iterator[Rectangle]:
    row = math.prod(shape[1:])
    index = start // row
    for part in rectangles(shape[1:], start - index * row, end - index * row):
        yield Rectangle((index, *part.offset), (1, *part.shape), index * row + part.start)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
