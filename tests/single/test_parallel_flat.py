"""Flat buckets: what lies where, and how a part of one is cut into rectangles."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from hvdlm.config import ModelConfig
from hvdlm.models import MODELS
from hvdlm.parallel.flat import flatten_, rectangles


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (5, 1), (2, 3, 4)])
def test_rectangles_cover_a_run_of_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            cuts = list(rectangles(shape, start, end))
            found = []
            for cut in cuts:
                part = whole[tuple(slice(o, o + n) for o, n in zip(cut.offset, cut.shape, strict=True))]
                assert part.reshape(-1)[0] == cut.start
                assert part.shape == cut.shape
                found += part.reshape(-1).tolist()
            assert found == list(range(start, end))
            assert len(cuts) <= max(1, 2 * len(shape) - 1)


def test_a_model_in_buckets_computes_the_same() -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=2, width=16, heads=2)
    model, plain = MODELS["transformer"](config, 64), MODELS["transformer"](config, 64)
    plain.load_state_dict(model.state_dict())
    buckets = flatten_(model, bucket_mb=4000 / 2**20, multiple=3)
    assert len(buckets) > 3
    assert [b.is_decayed for b in buckets] == sorted((b.is_decayed for b in buckets), reverse=True)
    names = [place.name for bucket in buckets for place in bucket.places]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    tokens = torch.randint(0, 64, (2, 9))
    for one in (model, plain):
        one.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()  # type: ignore[operator]
    for bucket in buckets:
        assert bucket.values.numel() % (3 * 32) == 0
        gradients, values = bucket.views(bucket.gradients), bucket.views(bucket.values)
        for place in bucket.places:
            wanted = dict(plain.named_parameters())[place.name]
            assert wanted.grad is not None
            torch.testing.assert_close(gradients[place.name], wanted.grad)
            assert torch.equal(values[place.name], wanted)
            assert place.parameter.data_ptr() == values[place.name].data_ptr()
            assert place.start * 4 % 128 == 0
        used = sum(place.parameter.numel() for place in bucket.places)
        assert torch.count_nonzero(bucket.values) <= used


def test_a_bucket_ends_before_it_grows_beyond_its_limit() -> None:
    random.seed(1)
    model = nn.Sequential(*[nn.Linear(random.randint(1, 40), random.randint(1, 40)) for _ in range(30)])
    for bucket in flatten_(model, bucket_mb=8000 / 2**20):
        total = sum(place.parameter.numel() for place in bucket.places)
        assert total <= 2000 or len(bucket.places) == 1
