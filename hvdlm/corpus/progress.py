"""How far everybody is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from typing import Any, final

from tqdm import tqdm

from hvdlm.corpus.job import Tally
from hvdlm.corpus.work import Work

_LINE_EVERY_S = 30.0
_BAR_EVERY_S = 0.5
_NOTHING = Tally()


@final
class Progress:
    """Counts what this process does, for its signs of life, and shows what all do. A context manager.

    Args:
        work: where the others' counts are found.
        shows: this process prints.
    """

    def __init__(self, work: Work, *, shows: bool) -> None:
        self._work, self._shows = work, shows
        self._bar: tqdm | None = None
        self._stage, self._count, self._total_bytes = "", 0, 0
        self._before = Tally()
        self._tallies: dict[str, list[int]] = defaultdict(lambda: [0] * len(Tally()))
        self._begun = self._line_at = time.monotonic()
        work.signs.counts = lambda: dict(self._tallies)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._close_bar()

    def __call__(self, tally: Tally) -> None:
        """Count; also looks whether this start shall end.

        Raises:
            UserError: as `Work.check`.
        """
        counts = self._tallies[self._stage]
        for i, value in enumerate(tally):
            counts[i] += value
        self._work.check()

    def stage(self, name: str, *, count: int, total_bytes: int, before: Tally = _NOTHING) -> None:
        """Begin a stage.

        Args:
            name: for people.
            count: tasks it has.
            total_bytes: their weight.
            before: bytes and tasks that an earlier start has done.
        """
        self._close_bar()
        self._stage, self._count, self._total_bytes, self._before = name, count, total_bytes, before
        self._begun = self._line_at = time.monotonic()
        if not self._shows or not total_bytes:
            return
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_bytes,
                initial=before.read_bytes,
                desc=name,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
            )
        else:
            done = f", {before.tasks:,} of them were done before" if before.tasks else ""
            self._print(f"{name}: {total_bytes / 1e6:,.1f} MB in {count:,} tasks{done}")

    def _run(self) -> None:
        while not self._closing.wait(_BAR_EVERY_S):
            now = time.monotonic()
            bar, due = self._bar, now - self._line_at >= _LINE_EVERY_S
            if not self._shows or not self._total_bytes or not (bar or due):
                continue
            totals = self._totals()
            if bar:
                bar.set_postfix_str(self._words(totals, now), refresh=False)
                bar.n = min(self._total_bytes, self._before.read_bytes + totals.read_bytes)
                bar.refresh()
            elif due:
                self._line_at = now
                self._print(self._line(totals, now))

    def _totals(self) -> Tally:
        """What all processes of this start have counted in this stage."""
        own: dict[str, Any] = dict(self._tallies)
        everybody = [own] if self._work.crew.size == 1 else self._work.signs.told()
        counts = [one.get(self._stage, [0] * len(Tally())) for one in everybody]
        return Tally(*(sum(column) for column in zip(*counts, strict=True))) if counts else Tally()

    def _line(self, totals: Tally, now: float) -> str:
        done = self._before.read_bytes + totals.read_bytes
        rate = max(totals.read_bytes / (now - self._begun), 1.0)
        return (
            f"{self._stage}: {done / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s, "
            f"{self._words(totals, now)}, {max(self._total_bytes - done, 0) / rate:,.0f} s left"
        )

    def _words(self, totals: Tally, now: float) -> str:
        words = []
        if totals.tasks:
            words.append(f"{self._before.tasks + totals.tasks:,} of {self._count:,} tasks")
        if totals.documents:
            words.append(f"{totals.documents:,} documents")
        if totals.tokens:
            words.append(f"{totals.tokens / (now - self._begun):,.0f} tokens/s")
        if totals.rejected:
            words.append(f"{totals.rejected:,} rejected")
        return ", ".join(words) or "reading"

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _close_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
