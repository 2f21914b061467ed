"""All-reduces over the nodes by the launcher and the transport that the run will use; a rank on each node.

Over all nodes for correctness and speed, then in pairs, each node with several partners: who is slow
with all of them is slow itself, and its partners are not.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvdlm.comm import launch
from hvdlm.config import ParallelConfig

ANSWER = "hvdlm preflight rank:"
_PARTNERS = 3
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 26
_LARGE_BYTES = 1 << 24
_MEASURE_S, _MOST_S = 1.0, 3.0


def rank(meeting: Path, *, limit_s: float) -> int:
    """One rank: sums, measures, and prints one line that begins with ANSWER.

    Args:
        meeting: a folder that all nodes see, where ranks without a PMI meet.
        limit_s: seconds until this process ends itself, also inside MPI.

    Collective: every rank of the job calls it.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    import horovod.torch as hvd
    import torch

    from hvdlm.comm import world as worlds

    here = launch.classify(os.environ)
    settings = launch.process_settings(
        here, ParallelConfig(), env=os.environ, cores=os.cpu_count() or 1, gpus=torch.cuda.device_count()
    )
    world = worlds.init(here, settings, meeting=meeting)
    device = torch.device("cuda" if torch.cuda.is_available() and hvd.nccl_built() else "cpu")
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    nodes = world.gather_json(node, name="preflight.nodes")
    ok = _sums_right(world.rank, world.size, device)
    said: dict[str, Any] = {"node": node, "ranks": world.size, "right": ok}
    said["gib_s"] = _speed(hvd.global_process_set, device, name="all")
    said["pairs"] = {}
    for number, pairs in enumerate(tournament(world.size)):
        # All ranks register every pair, in one order, before any pair begins.
        sets = [(pair, _members(pair, world.size)) for pair in pairs]
        for pair, members in sets:
            if world.rank in pair:
                partner = nodes[sum(pair) - world.rank]
                said["pairs"][partner] = _speed(members, device, name=f"pair{number}")
    print(f"{ANSWER} {json.dumps(said)}", flush=True)
    world.barrier(name="preflight.end")
    world.close()
    return 0 if ok else 1


def _members(pair: tuple[int, int], size: int) -> Any:
    """Horovod knows each set once, and that of all ranks from the start."""
    import horovod.torch as hvd

    return hvd.global_process_set if size == len(pair) else hvd.add_process_set(list(pair))


def tournament(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds of disjoint pairs, in which each rank meets up to three others.

    Source: the circle method for round-robin tournaments (Kirkman, 1847).
    """
    size = ranks + ranks % 2
    for number in range(min(_PARTNERS, size - 1) if ranks > 1 else 0):
        circle = [0, *((i + number) % (size - 1) + 1 for i in range(size - 1))]
        pairs = [(circle[i], circle[size - 1 - i]) for i in range(size // 2)]
        yield [(min(p), max(p)) for p in pairs if max(p) < ranks]


def _sums_right(rank: int, size: int, device: Any) -> bool:
    import horovod.torch as hvd
    import torch

    ok = True
    for count in (1, 1000, 100_003):
        # Whole numbers below 2^24, which fp32 has exactly.
        values = torch.arange(count, device=device) % 1009 + float(rank)
        total = hvd.allreduce(values, op=hvd.Sum, name=f"preflight.sum.{count}")
        needed = (torch.arange(count, device=device) % 1009) * float(size) + size * (size - 1) / 2
        ok = ok and bool((total == needed).all())
    return ok


def _speed(process_set: Any, device: Any, *, name: str) -> float:
    """GiB/s summed: the best of messages that double until the time is over.

    Collective: the ranks of the set.
    """
    import horovod.torch as hvd
    import torch

    size, best, all_s, begin = _LEAST_BYTES, 0.0, 0.0, time.perf_counter()
    numbers = itertools.count()
    # Small messages measure how soon a process gets a core; on a slow link large ones would take for ever.
    while all_s <= _MEASURE_S or (size < _LARGE_BYTES and all_s <= _MOST_S):
        number = next(numbers)
        values = torch.ones(size // 4, device=device)
        sent = time.perf_counter()
        hvd.allreduce_(values, op=hvd.Max, name=f"preflight.{name}.{number}", process_set=process_set)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        # The ranks of a set have to agree on what comes next.
        times = torch.tensor([now - sent, now - begin])
        hvd.allreduce_(times, op=hvd.Max, name=f"preflight.{name}.{number}.s", process_set=process_set)
        took_s, all_s = times.tolist()
        best = max(best, size / took_s / 2**30)
        size = min(2 * size, _MOST_BYTES)
    return best
