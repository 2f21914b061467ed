"""What goes from one world of an elastic run to the next."""

from __future__ import annotations

import json

import torch

from hvdlm.comm.launch import Launch
from hvdlm.comm.world import World
from hvdlm.parallel.strategy import StepStats, Wish
from hvdlm.run.course import Course
from hvdlm.run.progress import Progress
from hvdlm.train.carry import shared_read

STATS = StepStats(2.5, 64, 0.7, skipped=False, wish=Wish(save=True, resize=True))


def row(step: int) -> dict[str, int]:
    return {"step": step, "first_sample": 8 * step - 8, "end_sample": 8 * step, "world_size": 2, "attempt": 1}


def test_it_is_told_to_other_ranks_whole() -> None:
    progress = Progress(4, 2, Course(losses=(3.0,)), [{"step": 2, "val_loss": 3.5}])
    progress.took(5, STATS, 1e-3)
    progress.rows.append(row(5))
    assert Progress.from_record(json.loads(json.dumps(progress.to_record()))) == progress
    assert not progress.is_settled
    assert progress.course.losses == (3.0, 2.5)


def test_rows_are_kept_until_a_checkpoint_has_them() -> None:
    progress = Progress(0, 0, Course(), [])
    for step in (1, 2, 3):
        progress.took(step, STATS, 1e-3)
        progress.rows.append(row(step))
        progress.settled(progress.course, [])
    progress.saved(2)
    assert (progress.saved_step, progress.rows) == (2, [row(3)])


def test_tensors_are_read_bit_by_bit() -> None:
    alone = World(Launch("single"))
    tensors = {"model.x": torch.tensor([float("nan"), -0.0, 1e-45]), "optim.count": torch.tensor(7.0)}
    read = shared_read(tensors, alone)
    bits = read("model.x", (0,), (3,)).view(torch.int32)
    assert bits.tolist() == tensors["model.x"].view(torch.int32).tolist()
    assert read("optim.count", (), (), ()) == 7
