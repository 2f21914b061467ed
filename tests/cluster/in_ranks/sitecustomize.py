"""Python runs this at its start where the folder is on its path: what a test wants of training's ranks.

- HVDLM_TEST_STEP_S: a step takes at least so long, as that of a large model does, without its work.
- HVDLM_TEST_FAILS: rank 1 raises at step 30, once: the file of that name says that it has.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def _fail_once() -> None:
    name = os.environ.get("HVDLM_TEST_FAILS", "")
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("SLURM_PROCID"))
    if name and rank == "1" and not Path(name).exists():
        Path(name).touch()
        print(1 // 0)


def _change_steps() -> None:
    from hvdlm.data.loader import Loader, StepBatch

    read_steps, step_s = Loader.steps, float(os.environ["HVDLM_TEST_STEP_S"])

    def steps(self: Loader, start_step: int) -> Iterator[StepBatch]:
        for batch in read_steps(self, start_step):
            time.sleep(step_s)
            if batch.step == 30:
                _fail_once()
            yield batch

    Loader.steps = steps  # type: ignore[method-assign]


if "hvdlm.train" in sys.orig_argv and "HVDLM_TEST_STEP_S" in os.environ:
    _change_steps()
