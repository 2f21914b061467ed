"""How far an action is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import final

from tqdm import tqdm

_LINE_EVERY_S = 30.0


@final
class Progress:
    """Counts bytes of one action. A context manager, because a bar must be closed on errors too."""

    def __init__(self, action: str, total_bytes: int, *, line_every_s: float = _LINE_EVERY_S) -> None:
        """Args:
        action: What is going on, for people.
        total_bytes: When it is done.
        line_every_s: How often a batch log gets a line.
        """
        self._action, self._total, self._done = action, total_bytes, 0
        self._line_every_s = line_every_s
        self._begun = self._told = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes, desc=action, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, more_bytes: int) -> None:
        """Count `more_bytes` as done."""
        self._done += more_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(more_bytes)
        elif now - self._told >= self._line_every_s:
            self._told = now
            rate = max(self._done / max(now - self._begun, 1e-3), 1.0)
            print(
                f"{self._action}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
                f"{rate / 1e6:,.1f} MB/s, {(self._total - self._done) / rate:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
