"""What the ranks tell each other at every log line: how fast each computes, and how much memory is left."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, final

import psutil

from hvdlm.comm.world import World
from hvdlm.parallel.strategy import Wish
from hvdlm.run.node_memory import memory_left
from hvdlm.run.stragglers import Stragglers, median_ms, slowdown

_LOW_MEMORY = 0.05


@final
class Pulse:
    """Measures this rank from log line to log line.

    Attributes:
        warnings: lines for the user, from the last `beat`.

    Args:
        ranks: of the run.
        wish: what this rank asks for after a step; one for a save is added where memory runs short.
    """

    def __init__(self, ranks: World, wish: Callable[[], Wish]) -> None:
        self.warnings: list[str] = []
        self._ranks = ranks
        self._wish = wish
        self._save_wanted = False
        self._busy_s = 0.0
        self._slots = 0
        self._host = socket.gethostname()
        self._process = psutil.Process()
        self._first_rss_bytes: list[int] = []
        self._low_hosts: set[str] = set()
        self._stragglers = Stragglers()

    def begin_step(self, slots: int) -> Callable[[], Wish]:
        """Start the clock of a step with so many micro-slots.

        Returns:
            What this rank asks for. A strategy calls it right after its own backward pass, which stops
            the clock: from there on it waits for others.
        """
        since = time.perf_counter()

        def wish() -> Wish:
            self._busy_s += time.perf_counter() - since
            self._slots += slots
            own = self._wish()
            save, self._save_wanted = own.save or self._save_wanted, False
            return own._replace(save=save)

        return wish

    def beat(self) -> dict[str, Any]:
        """Tell the others, and hear from them.

        Returns:
            Fields for the row of this step in metrics.jsonl.

        Collective: yes.
        """
        left = memory_left()
        own = {
            "host": self._host,
            "slot_ms": 1000 * self._busy_s / self._slots if self._slots else None,
            "rss_bytes": self._process.memory_info().rss,
            "available_bytes": left.available_bytes,
            "limit_bytes": left.limit_bytes,
        }
        self._busy_s, self._slots = 0.0, 0
        of_ranks = self._ranks.gather_json(own, name="pulse.beat")
        self.warnings = [*self._look_at_memory(of_ranks), *self._look_at_speed(of_ranks)]
        rss_bytes = [one["rss_bytes"] for one in of_ranks]
        self._first_rss_bytes = self._first_rss_bytes or rss_bytes
        growth = max(now - first for now, first in zip(rss_bytes, self._first_rss_bytes, strict=True))
        row = {"rss_mib": max(rss_bytes) >> 20, "rss_growth_mib": growth >> 20}
        if self._ranks.size == 1:
            return row
        slowest, times = slowdown([one["slot_ms"] for one in of_ranks])
        return row | {"slowest_rank": slowest, "slowdown": round(times, 3)}

    def _look_at_memory(self, of_ranks: list[dict[str, Any]]) -> list[str]:
        """A line for each node that is short of memory for the first time; rank 0 then asks for a save."""
        lines = []
        for one in of_ranks:
            available, limit, host = one["available_bytes"], one["limit_bytes"], one["host"]
            if available < _LOW_MEMORY * limit and host not in self._low_hosts:
                self._low_hosts.add(host)
                self._save_wanted = self._ranks.is_root
                here = sum(other["rss_bytes"] for other in of_ranks if other["host"] == host)
                lines.append(
                    f"warning: node {host} has {available / 2**30:.2f} of {limit / 2**30:.2f} GiB of memory "
                    f"left, its ranks hold {here / 2**30:.2f} GiB; the kernel may end them, so this run "
                    "saves now; ask for more memory, or lower train.micro_batch"
                )
        return lines

    def _look_at_speed(self, of_ranks: list[dict[str, Any]]) -> list[str]:
        """A line for each rank that was slow for long."""
        if self._ranks.size == 1:
            return []
        slot_ms = [one["slot_ms"] for one in of_ranks]
        return [
            f"warning: rank {rank} on {of_ranks[rank]['host']} takes {slot_ms[rank]:.1f} ms a micro-batch, "
            f"others {median_ms(slot_ms):.1f}; all wait for it: look at that node, or leave it out"
            for rank in self._stragglers.look(slot_ms)
        ]
