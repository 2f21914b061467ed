"""`python failing_train.py WHERE ARGUMENTS`: the training command, in which rank 1 fails after step 3."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

from hvdlm.config import run_command
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.train.__main__ import main

WHERE = sys.argv.pop(1)
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0")))
read_steps = Loader.steps


def fail() -> None:
    print(1 // 0)


def failing_steps(self: Loader, start_step: int) -> Iterator[StepBatch]:
    for batch in read_steps(self, start_step):
        if batch.step == 4 and RANK == 1:
            if WHERE == "step":
                fail()
            threading.Thread(target=fail).start()
        yield batch


if __name__ == "__main__":
    Loader.steps = failing_steps  # type: ignore[method-assign]
    sys.exit(run_command("train", main))
