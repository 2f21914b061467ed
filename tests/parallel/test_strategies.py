"""Every strategy: N ranks take the step that one process takes, also with uneven and empty shares."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import ModelConfig, OptimConfig, ParallelConfig
from hvdlm.data.loader import Slot, StepBatch
from hvdlm.data.order import share_of
from hvdlm.models import MODELS
from hvdlm.parallel import STRATEGIES, Strategy
from hvdlm.parallel.strategy import Wish
from hvdlm.run import checkpoint, restore

OPTIM = OptimConfig(lr=1e-2, clip=0.5, weight_decay=0.1)
MODEL = ModelConfig(layers=1, width=16, heads=2, dropout=0.1)
VOCAB, SEQ_LEN, MICRO_BATCH, SLOTS = 64, 8, 2, 4


def never() -> Wish:
    return Wish()


def wish_of(rank: int, step: int) -> Wish:
    """One rank asks to stop after step 3, another to save after 2 and 3."""
    return Wish(stop=(rank, step) == (1, 3), save=rank == 0 and step in (2, 3))


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return MODELS["transformer"](MODEL, VOCAB)


def step_batch(step: int, world: World) -> StepBatch:
    """This rank's slots of a global batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (SLOTS, MICRO_BATCH, SEQ_LEN + 1), generator=generator)
    slots = [
        Slot(i, 100 * step + i, {"tokens": tokens[i, :, :-1], "labels": tokens[i, :, 1:]})
        for i in share_of(SLOTS, (world.rank, world.size))
    ]
    count = SLOTS * MICRO_BATCH
    return StepBatch(step, (step - 1) * count, step * count, count * SEQ_LEN, slots)


def new_strategy(name: str, model: nn.Module, world: World, **parallel: Any) -> Strategy:
    slots = len(share_of(SLOTS, (world.rank, world.size)))
    section = ParallelConfig(strategy=name, **parallel)  # type: ignore[arg-type]
    return STRATEGIES[name](model, world, optim=OPTIM, parallel=section, precision="fp32", slots=slots)


def reference_steps(model: nn.Module, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by plain PyTorch on one process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    found = []
    alone = type("Alone", (), {"rank": 0, "size": 1})()
    for step in range(1, steps + 1):
        batch = step_batch(step, alone)
        total = 0.0
        for slot in batch.slots:
            torch.manual_seed(slot.rng_seed)
            loss = model.loss(**slot.batch)[0] / batch.label_count  # type: ignore[operator]
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 - OPTIM.lr * OPTIM.weight_decay * (p.dim() >= 2))
        optimizer.step()
        optimizer.zero_grad()
        found.append((total, float(norm.detach())))
    return found


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_step_is_that_of_one_process(world: World, ranks: int, name: str) -> None:
    reference = new_model()
    expected = reference_steps(reference, 4)
    torch.manual_seed(99 + world.rank)
    model = new_model()
    if world.rank:
        # What construction must put right: other ranks begin with other weights.
        nn.init.zeros_(next(model.parameters()))
    strategy = new_strategy(name, model, world)
    for step in range(1, 5):
        stats = strategy.step(step_batch(step, world), OPTIM.lr, wish=partial(wish_of, world.rank, step))
        assert stats.loss == pytest.approx(expected[step - 1][0], rel=1e-5)
        assert stats.grad_norm == pytest.approx(expected[step - 1][1], rel=1e-5)
        assert stats.count == SLOTS * MICRO_BATCH * SEQ_LEN
        assert not stats.skipped
        assert stats.wish == (step == 3 and ranks > 1, step in (2, 3))
    assert world.same(strategy.digest(), name="digest")
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_nan_on_one_rank_updates_nothing_anywhere(world: World, ranks: int, name: str) -> None:
    model = new_model()
    strategy = new_strategy(name, model, world)
    strategy.step(step_batch(1, world), OPTIM.lr, wish=never)
    before = copy.deepcopy(model.state_dict())
    count = {p.name: p.values.clone() for p in strategy.pieces() if p.name == "optim.count"}
    batch = step_batch(2, world)
    first = next(model.parameters())
    hook = first.register_hook(lambda g: g * float("nan")) if world.rank == 1 else None
    stats = strategy.step(batch, OPTIM.lr, wish=never)
    if hook:
        hook.remove()
    assert stats.skipped
    assert all(torch.equal(before[key], values) for key, values in model.state_dict().items())
    assert all(torch.equal(count[p.name], p.values) for p in strategy.pieces() if p.name in count)
    assert not strategy.step(step_batch(3, world), OPTIM.lr, wish=never).skipped


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loss_above_its_limit_updates_nothing_anywhere(world: World, ranks: int, name: str) -> None:
    strategy = new_strategy(name, new_model(), world)
    before = strategy.digest()
    assert strategy.step(step_batch(1, world), OPTIM.lr, wish=never, loss_limit=0.5).skipped
    assert strategy.digest() == before
    assert not strategy.step(step_batch(1, world), OPTIM.lr, wish=never, loss_limit=50.0).skipped
    assert strategy.digest() != before


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"fixed"}))
def test_fp16_on_the_wire_is_close(world: World, ranks: int, name: str) -> None:
    expected = reference_steps(new_model(), 1)[0]
    strategy = new_strategy(name, new_model(), world, compression="fp16")
    stats = strategy.step(step_batch(1, world), OPTIM.lr, wish=never)
    assert stats.grad_norm == pytest.approx(expected[1], rel=1e-2)
    assert stats.grad_norm != expected[1]


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_element_has_one_owner_and_is_loaded_back(
    world: World, ranks: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(world.broadcast_json(str(tmp_path_factory.mktemp("save")), name="folder"))
    strategy = new_strategy(name, new_model(), world)
    strategy.step(step_batch(1, world), OPTIM.lr, wish=never)
    owned = world.gather_json([[p.name, p.values.numel()] for p in strategy.pieces()], name="owned")
    names = [piece[0] for rank in owned for piece in rank]
    assert len(names) == len(set(names))
    assert all(rank for rank in owned), "every rank writes a part"
    parameters = sum(p.numel() for p in new_model().parameters())
    assert sum(piece[1] for rank in owned for piece in rank) == 3 * parameters + 1

    saved = checkpoint.save(folder, strategy.pieces(), world, state={"step": 1, "attempt": 1}, files={})
    digest = strategy.digest()
    other = new_strategy(name, new_model(), world)
    assert other.digest() != digest
    other.load(restore.open_checkpoint(saved).read)
    assert other.digest() == digest
    stats = [s.step(step_batch(2, world), OPTIM.lr, wish=never) for s in (strategy, other)]
    assert stats[0] == stats[1]
    assert strategy.digest() == other.digest()
