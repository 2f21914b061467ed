"""Signs of life: each process rewrites a file every few seconds, with what it has counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from hvdlm.data.files import TEMP_PREFIX

_EVERY_S = 5.0


@final
class Signs:
    """The signs of one process, and those it sees. A context manager: a thread gives them meanwhile, so that
    a process inside a long library call, or among thousands of files, still lives to others.

    Args:
        starts: folder with a folder for each start.
        name: of this start.
        rank: of this process in it.

    Attributes:
        counts: asked for what to tell with a sign, JSON.
    """

    def __init__(self, starts: Path, name: str, rank: int) -> None:
        self.counts: Callable[[], dict[str, Any]] = dict
        self._starts, self._name, self._rank = starts, name, rank
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs", daemon=True)
        sign_of_life(starts, name, rank).parent.mkdir(parents=True, exist_ok=True)
        self.give()

    def __enter__(self) -> Signs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def give(self) -> None:
        """Give one now."""
        path = sign_of_life(self._starts, self._name, self._rank)
        temp = path.with_name(f"{TEMP_PREFIX}{path.name}")
        with suppress(OSError):
            temp.write_text(json.dumps(self.counts()))
            temp.rename(path)

    def told(self) -> list[dict[str, Any]]:
        """The newest counts of every process of this start."""
        counts = []
        for path in sorted((self._starts / self._name / "alive").glob("[0-9]*.json")):
            with suppress(OSError, ValueError):
                counts.append(json.loads(path.read_bytes()))
        return counts

    def of_others(self, *, within_s: float) -> dict[Path, int]:
        """When the processes of other starts last gave one, in nanoseconds; old ones left out."""
        signs = {}
        for path in self._starts.glob("*/alive/[0-9]*.json"):
            with suppress(FileNotFoundError):
                if path.parents[1].name != self._name and self._age_s(path) < within_s:
                    signs[path] = path.stat().st_mtime_ns
        return signs

    def age_s(self, rank: int | None, claim: Path) -> float:
        """Seconds since a process of this start gave one; where nobody knows its rank, since it claimed.

        Raises:
            FileNotFoundError: it never did.
        """
        return self._age_s(claim if rank is None else sign_of_life(self._starts, self._name, rank))

    def _age_s(self, path: Path) -> float:
        """Seconds between a change and this process's last sign.

        Both times are the file server's, whose clock need not be ours.
        """
        own = sign_of_life(self._starts, self._name, self._rank)
        return own.stat().st_mtime - path.stat().st_mtime

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self.give()


def sign_of_life(starts: Path, name: str, rank: int) -> Path:
    """What a process of the start `name` rewrites now and then."""
    return starts / name / "alive" / f"{rank:05d}.json"
