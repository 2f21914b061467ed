"""What the steps of a rank spend their time on, as a trace that https://ui.perfetto.dev shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import TypeVar, final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = "profile"
_WARM_UP_STEPS = 2

Batch = TypeVar("Batch")


@final
class Profile:
    """Traces some steps of this rank, from the third after the start, and writes one file.

    Args:
        run_folder: the trace is written to `profile/ATTEMPT.RANK.json` in it.
        steps: how many to trace; 0 = none, and then nothing is done at all.
        attempt: number of this start of the run.
        rank: of this process.
    """

    def __init__(self, run_folder: Path, *, steps: int, attempt: int, rank: int) -> None:
        self._path = run_folder / FOLDER / f"{attempt}.{rank}.json"
        self._steps = steps
        self._trace: profile | None = None

    def notes(self, start_step: int, last_step: int) -> list[str]:
        """Lines for the user: which steps are traced, and how to see them.

        Args:
            start_step: steps done before this attempt.
            last_step: of the run.
        """
        first = start_step + _WARM_UP_STEPS + 1
        if not self._steps:
            return []
        if first > last_step:
            return [
                f"warning: log.profile begins with step {first}, and step {last_step} is the last: no trace"
            ]
        last = min(last_step, first + self._steps - 1)
        return [
            f"profile of steps {first} to {last}: {self._path.parent}, a file a rank; open one in "
            "https://ui.perfetto.dev"
        ]

    def steps(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; those of the steps to trace are loaded, and worked on, under the profiler."""
        return self._traced(batches) if self._steps else batches

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Name what happens inside: `hvdlm.NAME` in the trace, on a GPU an NVTX range as well."""
        if self._trace is None:
            return nullcontext()
        ranges = ExitStack()
        ranges.enter_context(record_function(f"hvdlm.{name}"))
        if torch.cuda.is_initialized():
            ranges.enter_context(torch.cuda.nvtx.range(f"hvdlm.{name}"))
        return ranges

    def close(self) -> None:
        """Write the trace, where one was begun and is not yet written."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        temp = self._path.with_suffix(".tmp")
        self._path.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(temp))
        temp.rename(self._path)

    def _traced(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from islice(batches, _WARM_UP_STEPS)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._trace.start()
        for _ in range(self._steps):
            with self.phase("load"):
                batch = next(batches)
            yield batch
        self.close()
        yield from batches
