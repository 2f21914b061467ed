"""`python failing_train.py WHERE ARGUMENTS`: the training command, in which rank 1 fails after step 3.

WHERE: step, thread, or bit (which of one parameter is changed, in silence).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from hvdlm.config import run_command
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.parallel.allreduce import AllReduce
from hvdlm.train.__main__ import main

WHERE = sys.argv.pop(1)
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0")))
read_steps = Loader.steps
strategies: list[AllReduce] = []
build = AllReduce.__init__


def build_and_keep(self: AllReduce, *arguments: Any, **more: Any) -> None:
    build(self, *arguments, **more)
    strategies.append(self)


def change_a_bit() -> None:
    next(strategies[0]._model.parameters()).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def fail() -> None:
    print(1 // 0)


def failing_steps(self: Loader, start_step: int) -> Iterator[StepBatch]:
    for batch in read_steps(self, start_step):
        if batch.step == 4 and RANK == 1:
            if WHERE == "step":
                fail()
            if WHERE == "bit":
                change_a_bit()
                yield batch
                continue
            threading.Thread(target=fail).start()
        yield batch


if __name__ == "__main__":
    AllReduce.__init__ = build_and_keep  # type: ignore[method-assign]
    Loader.steps = failing_steps  # type: ignore[method-assign]
    sys.exit(run_command("train", main))
