"""How far a long phase is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import final

from tqdm import tqdm

_LINE_EVERY_S = 30.0


@final
class Progress:
    """Counts bytes of one phase. A context manager, because a bar must be closed on errors too."""

    def __init__(self, phase: str, total_bytes: int) -> None:
        """Args:
        phase: what is going on, for people.
        total_bytes: bytes of input when it is done.
        """
        self._phase, self._total, self._done = phase, total_bytes, 0
        self._begun = self._told = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, desc=phase, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )
        else:
            print(f"{phase}: {total_bytes / 1e6:,.1f} MB", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, more_bytes: int) -> None:
        """Count `more_bytes` as done."""
        self._done += more_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(more_bytes)
        elif now - self._told >= _LINE_EVERY_S:
            self._told = now
            rate = max(self._done / (now - self._begun), 1.0)
            print(
                f"{self._phase}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
                f"{rate / 1e6:,.1f} MB/s, {(self._total - self._done) / rate:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
