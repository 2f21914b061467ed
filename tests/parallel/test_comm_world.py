"""Named collectives, on real ranks and on one."""

from __future__ import annotations

import pytest
import torch

from hvdlm.comm import world as worlds
from hvdlm.comm.launch import Launch
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import UserError

ALONE = World(Launch("single"))


def check_collectives(world: World) -> None:
    n, rank = world.size, world.rank
    total = world.sum_(torch.tensor([rank, 1.0], dtype=torch.float64), name="sum")
    assert total.tolist() == [n * (n - 1) / 2, n]
    assert world.any(rank == n - 1, name="any.last")
    assert not world.any(False, name="any.none")
    assert world.broadcast_json({"from": rank, "ä": [1, None]}, name="json") == {"from": 0, "ä": [1, None]}
    assert world.gather_json({"rank": rank, "x": "y" * rank}, name="gather") == [
        {"rank": r, "x": "y" * r} for r in range(n)
    ]
    for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.float32):
        values = world.broadcast_(torch.full((3, 2), rank + 1).to(dtype), name=f"broadcast.{dtype}")
        assert torch.equal(values, torch.ones(3, 2).to(dtype))
    world.barrier(name="barrier")


def check_on_root(world: World) -> None:
    calls = []

    def work() -> list[int]:
        calls.append(1)
        return [7]

    assert world.on_root(work, name="root") == [7]
    assert len(calls) == (world.rank == 0)

    def fail() -> None:
        raise UserError("x: found y", exit_code=1)

    with pytest.raises(AgreedError, match="x: found y") as caught:
        world.on_root(fail, name="root.fail")
    assert caught.value.exit_code == 1


@pytest.mark.ranks(2, 3)
def test_collectives_on_ranks(world: World, ranks: int) -> None:
    assert world.size == ranks
    check_collectives(world)
    check_on_root(world)
    # Where the launcher names no local rank, as some PMIs do not.
    assert worlds._ask_mpi() == (world.rank, ranks)


def test_collectives_alone() -> None:
    check_collectives(ALONE)
    check_on_root(ALONE)
