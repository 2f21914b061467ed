"""Strategy "fixed": one curve and one model, to the last bit, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvdlm.comm.world import World
from hvdlm.run import restore
from tests import helpers
from tests.parallel.test_strategies import never, new_model, new_strategy, step_batch

FIXED = ("--parallel.strategy", "fixed", "--model.dropout", "0.1", "--train.steps", "12")
# Of 6 slots the ranks' runs, 3 + 3 or 1 + 2 + 1 + 2, are no nodes of the tree.
BATCHES = {8: ("--train.global_batch", "8", "--train.micro_batch", "1"), 6: ("--train.global_batch", "12")}


def launcher(ranks: int) -> list[str]:
    return helpers.mpirun(ranks) if ranks > 1 else []


def train(data: Path, run_folder: Path, *, ranks: int, slots: int) -> Path:
    command = [*launcher(ranks), *helpers.train_command(data, run_folder, *BATCHES[slots], *FIXED)]
    done = helpers.run(command)
    assert done.returncode == 0, done.stdout
    return run_folder


def curve(run_folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm; JSON keeps every bit of them."""
    rows = {row["step"]: row for row in helpers.rows(run_folder, "metrics.jsonl", kind="train")}
    return [(step, rows[step]["loss"], rows[step]["grad_norm"]) for step in sorted(rows)]


def validations(run_folder: Path) -> list[tuple[int, float]]:
    rows = {row["step"]: row["val_loss"] for row in helpers.rows(run_folder, "metrics.jsonl", kind="eval")}
    return sorted(rows.items())


def tensors(run_folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of the last checkpoint."""
    saved = restore.open_checkpoint(run_folder)
    found = {}
    for name, tensor in saved.manifest["tensors"].items():
        shape = tuple(tensor["shape"])
        found[name] = saved.read(name, (0,) * len(shape), shape).numpy().tobytes()
    return found


def assert_same_bits(run_folder: Path, reference: Path) -> None:
    assert [row[0] for row in curve(reference)] == list(range(1, 13))
    assert curve(run_folder) == curve(reference)
    assert validations(run_folder) == validations(reference)
    assert tensors(run_folder) == tensors(reference)


@pytest.fixture(scope="module")
def one_rank(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of each number of slots the run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    return {slots: train(tiny_data, folder / f"{slots}", ranks=1, slots=slots) for slots in BATCHES}


@pytest.mark.parametrize(("ranks", "slots"), [(2, 8), (3, 8), (4, 8), (8, 8), (2, 6), (4, 6), (8, 6)])
def test_every_number_of_ranks_has_the_bits_of_one(
    ranks: int, slots: int, tiny_data: Path, tmp_path: Path, one_rank: dict[int, Path]
) -> None:
    assert_same_bits(train(tiny_data, tmp_path / "run", ranks=ranks, slots=slots), one_rank[slots])


@pytest.mark.ranks(1)
def test_it_computes_with_one_thread(world: World, ranks: int) -> None:
    # The kernels of a tiny model do not split their sums, so its curve alone would not show it.
    torch.set_num_threads(2)
    model, threads = new_model(), []
    next(model.parameters()).register_hook(lambda _: threads.append(torch.get_num_threads()))
    model.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    strategy = new_strategy("fixed", model, world)
    batch = step_batch(1, world)
    strategy.step(batch, 1e-3, wish=never)
    strategy.loss(batch.slots[0].batch)
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2, "others compute with theirs"


def test_a_run_stopped_on_three_ranks_goes_on_on_two(
    tiny_data: Path, tmp_path: Path, one_rank: dict[int, Path]
) -> None:
    run_folder = tmp_path / "run"
    command = helpers.train_command(tiny_data, run_folder, *BATCHES[8], *FIXED)
    run_folder.mkdir()
    (run_folder / "STOP").touch()
    stopped = helpers.run([*launcher(3), *command])
    assert stopped.returncode == 75, stopped.stdout
    assert 1 <= helpers.exit_record(run_folder)["step"] < 12
    train(tiny_data, run_folder, ranks=2, slots=8)
    assert_same_bits(run_folder, one_rank[8])
