"""Sums of slots by a tree that the ranks do not change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hvdlm.data.order import share_of
from hvdlm.parallel.tree import Span, partial_spans, push, tree_sum


def naive(values: np.ndarray) -> np.ndarray:
    """The tree as it is drawn: pairs of neighbors, then pairs of pairs; who has none goes up alone."""
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = np.stack([pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs])
    return values[0]


def some_values(slots: int) -> np.ndarray:
    generator = np.random.default_rng(slots)
    scales = 10.0 ** generator.integers(-4, 5, (slots, 100))
    return (scales * generator.normal(size=(slots, 100))).astype("f4")


def partial_sums(values: np.ndarray, run: range, slots: int) -> tuple[list[np.ndarray], list[Span]]:
    """As a rank adds up: in place, on a stack."""
    stack: list[np.ndarray] = []
    spans: list[Span] = []
    for slot in run:
        stack.append(values[slot])
        for _ in range(push(spans, (slot, slot + 1), slots)):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    return stack, spans


def sum_over_runs(values: np.ndarray, cuts: list[int]) -> np.ndarray:
    slots, rows, spans = len(values), [], []
    for first, end in pairwise(cuts):
        own, own_spans = partial_sums(values, range(first, end), slots)
        assert own_spans == partial_spans(range(first, end), slots)
        rows += own
        spans += own_spans
    return np.asarray(tree_sum(torch.from_numpy(np.stack(rows)), spans, slots))


@pytest.mark.parametrize("slots", range(1, 12))
def test_every_partition_gives_the_bits_of_the_drawn_tree(slots: int) -> None:
    values = some_values(slots)
    expected = naive(values).tobytes()
    for mask in range(2 ** (slots - 1)):
        cuts = [0, *(i for i in range(1, slots) if mask >> (i - 1) & 1), slots]
        assert sum_over_runs(values, cuts).tobytes() == expected, cuts


@pytest.mark.parametrize("slots", [1, 5, 8, 100, 127, 128, 129])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 64, 200])
def test_the_shares_of_ranks_give_the_bits_of_the_drawn_tree(slots: int, ranks: int) -> None:
    values = some_values(slots)
    cuts = [0, *(share_of(slots, (rank, ranks)).stop for rank in range(ranks))]
    assert sum_over_runs(values, cuts).tobytes() == naive(values).tobytes()


def test_numbers_are_added_by_the_same_tree() -> None:
    values = [0.1 * 3**i for i in range(6)]
    leaves = [(i, i + 1) for i in range(6)]
    assert tree_sum(values, leaves, 6) == ((0.1 + 0.1 * 3) + (0.1 * 9 + 0.1 * 27)) + (0.1 * 81 + 0.1 * 243)


def test_a_run_has_few_partial_sums() -> None:
    assert partial_spans(range(0, 8), 16) == [(0, 8)]
    assert partial_spans(range(3, 13), 16) == [(3, 4), (4, 8), (8, 12), (12, 13)]
    assert partial_spans(range(4, 5), 5) == [(4, 5)]
    assert partial_spans(range(4, 4), 5) == []
    assert max(len(partial_spans(range(a, b), 64)) for a in range(64) for b in range(a, 65)) <= 2 * 6
