"""`python tampered_train.py ARGUMENTS`: the training command on machines that are not well.

FLIP "RANK STEP": a bit of a parameter of that rank flips after that step. SPIKES "FIRST LAST": the loss of
these steps is 50 times as large. SLOW_RANK: its micro-slots each take 50 ms more. STOP_AT: rank 0 is told
to stop when it begins that step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from hvdlm.config import run_command
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.parallel import allreduce, fixed
from hvdlm.train.__main__ import main

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
FLIP_RANK, FLIP_STEP = map(int, os.environ.get("FLIP", "-1 -1").split())
FIRST_SPIKE, LAST_SPIKE = map(int, os.environ.get("SPIKES", "-1 -1").split())
SLOW_RANK = int(os.environ.get("SLOW_RANK", "-1"))
STOP_AT = int(os.environ.get("STOP_AT", "-1"))
read_steps, do_step, slot_loss = Loader.steps, allreduce.AllReduce.step, allreduce.slot_loss
step_now = [0]


def steps_one_by_one(self: Loader, start_step: int) -> Iterator[StepBatch]:
    for batch in read_steps(self, start_step):
        step_now[0] = batch.step
        if batch.step == STOP_AT and RANK == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch


def step_and_flip(self: allreduce.AllReduce, batch: StepBatch, lr: float, **more: Any) -> Any:
    stats = do_step(self, batch, lr, **more)
    if (RANK, batch.step) == (FLIP_RANK, FLIP_STEP):
        self._parameters[0].data.view(-1).view(torch.int32)[0] ^= 1 << 20
    return stats


def slot_loss_of_a_bad_day(*arguments: Any, **more: Any) -> Any:
    time.sleep(0.05 * (RANK == SLOW_RANK))
    spike = FIRST_SPIKE <= step_now[0] <= LAST_SPIKE
    return slot_loss(*arguments, **more) * (50 if spike else 1)


if __name__ == "__main__":
    Loader.steps = steps_one_by_one  # type: ignore[method-assign]
    allreduce.AllReduce.step = step_and_flip  # type: ignore[method-assign]
    allreduce.slot_loss = fixed.slot_loss = slot_loss_of_a_bad_day
    sys.exit(run_command("train", main))
