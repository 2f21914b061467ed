"""Which GPUs ranks may have between them; there is none here, so that what each says is made up."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from hvdlm.comm import device
from hvdlm.comm.world import AgreedError, World

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Ranks:
    """What `gather_json` of so many ranks gives."""

    def __init__(self, *places: tuple[str, str]) -> None:
        self.size = len(places)
        self._places = places

    def gather_json(self, value: Any, *, name: str) -> list[Any]:
        return [list(place) for place in self._places]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "own"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(device.hvd, "cuda_built", lambda: True)
    monkeypatch.setattr(device.hvd, "nccl_built", lambda: 22809)


def require(*places: tuple[str, str], where: torch.device = GPU) -> None:
    device.require_reductions(cast(World, Ranks(*places)), where)


def test_nccl_takes_a_gpu_from_one_rank(built: None) -> None:
    require(("a", "1"), ("a", "2"), ("b", "1"))
    with pytest.raises(AgreedError, match="ranks 0 and 2 share a GPU of a, which NCCL refuses"):
        require(("a", "1"), ("a", "2"), ("a", "1"))


def test_other_reductions_share(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.hvd, "nccl_built", lambda: 0)
    require(("a", "1"), ("a", "1"))


def test_a_horovod_without_gpus_is_named(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.hvd, "cuda_built", lambda: False)
    require(("a", "1"))
    require(("a", ""), ("a", ""), where=CPU)
    with pytest.raises(AgreedError, match="built without GPUs"):
        require(("a", "1"), ("b", "1"))
