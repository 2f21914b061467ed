"""Sums over all ranks by Horovod, MPI and torch.distributed in turn, and the best size of a bucket.

Run it as a training is run: `mpirun -np 4 --bind-to none python -m hvdlm.bench allreduce`. Every library
sums the same fp32 buffers in one process, and Horovod's thread goes on waking beside the others; every
sum is compared with arithmetic. A time is that of the slowest rank, the median over rounds.

Buckets are gradients of one size in all, cut into pieces that are under way together. Horovod's fusion is
off for that, so a bucket is a message: what `parallel.strategy` buckets, zero1 and ddp send. With allreduce
`fusion_mb` says how much Horovod copies together and sends as one, so the same size serves, less a copy.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvdlm.comm import device, launch, torch_group, world
from hvdlm.comm.reductions import Reduction, data_plane, reductions
from hvdlm.config import EXIT_USAGE, ParallelConfig, UserError
from hvdlm.run import crash

_COMMAND = "mpirun -np 2 --bind-to none python -m hvdlm.bench allreduce"
_SMALLEST_BYTES = 4096
# A small size is summed several times, one after the other, until so many bytes are.
_REPEAT_BYTES = 2**21
_MOST_REPEATS = 32
_GRADIENTS_MB = 128
# Smaller buckets start earlier in the backward pass: the smallest is taken that is nearly the fastest.
_AS_GOOD = 1.05


@dataclass(frozen=True)
class Message:
    """What is timed: buffers of one size, summed one after the other or all under way together."""

    name: str
    count: int
    bytes_each: int
    together: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench allreduce`."""
    parser.add_argument("--max-mb", type=int, default=256, help="largest message in MiB (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each of everything (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all sizes by all libraries, and all buckets by Horovod.

    Returns:
        On rank 0; on the others nothing. `libraries`; for each of `sizes` its `bytes` and, by library,
        `us`, `gb_per_s` (algorithm bandwidth: bytes / time) and `bus_gb_per_s`; `latency_us` of the
        smallest; `buckets`: milliseconds by size in MiB; `best_mb` and `toml`.

    Raises:
        UserError: there is one process, or an option is out of range.

    Collective: yes.
    """
    here = launch.classify(os.environ)
    if args.max_mb < 1 or args.rounds < 1 or here.size == 1:
        if here.rank:
            raise SystemExit(EXIT_USAGE)
        raise UserError(_refusal(args))
    # Fusion is read when Horovod starts: off, unless the user has set it.
    settings = launch.process_settings(
        here,
        ParallelConfig(fusion_mb=0),
        env=os.environ,
        cores=len(os.sched_getaffinity(0)),
        gpus=torch.cuda.device_count(),
    )
    ranks = world.init(here, settings)
    try:
        result = _measure(args, ranks)
        ranks.close()
        return result
    except BaseException as error:
        crash.end_job("bench", error, ranks)
        raise


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    names = result["libraries"]
    fusion = "off" if not result["fusion_bytes"] else f"{result['fusion_bytes']} bytes"
    lines = [
        f"{result['ranks']} ranks ({result['launch']}) on {result['device']}; "
        f"Horovod sums by {result['plane']}, fusion {fusion}, cycle {result['cycle_ms']:g} ms",
        f"{'':>11}" + "".join(f"{name:^34}" for name in names),
        f"{'bytes':>11}" + f"{'us':>12}{'GB/s':>10}{'bus GB/s':>12}" * len(names),
    ]
    for row in result["sizes"]:
        cells = ((row["us"][n], row["gb_per_s"][n], row["bus_gb_per_s"][n]) for n in names)
        lines.append(f"{row['bytes']:>11}" + "".join(f"{u:12.1f}{a:10.3f}{b:12.3f}" for u, a, b in cells))
    latencies = ", ".join(f"{name} {us:.0f} us" for name, us in result["latency_us"].items())
    lines.append(f"latency ({_SMALLEST_BYTES} bytes): {latencies}")
    lines.append(f"{result['gradients_mb']} MiB of gradients in buckets under way together, by Horovod:")
    lines += [f"{mb:>7} MiB {ms:10.1f} ms" for mb, ms in result["buckets"].items()]
    lines.append(f"smallest bucket within {_AS_GOOD - 1:.0%} of the fastest; for the configuration:")
    return "\n".join([*lines, result["toml"]])


def bus_bandwidth(bytes_per_s: float, ranks: int) -> float:
    """What each link carries when all ranks send what an all-reduce needs at least.

    Source: nccl-tests, doc/PERFORMANCE.md: algorithm bandwidth * 2 (n - 1) / n.
    """
    return bytes_per_s * 2 * (ranks - 1) / ranks


def _refusal(args: argparse.Namespace) -> str:
    if args.max_mb < 1 or args.rounds < 1:
        return f"bench allreduce: --max-mb {args.max_mb} and --rounds {args.rounds} must be at least 1"
    return f"bench allreduce: one process has nobody to sum with; start at least two: {_COMMAND}"


def _measure(args: argparse.Namespace, ranks: world.World) -> dict[str, Any]:
    where = device.pick(args.device, ranks.local_rank)
    torch_group.open_group(ranks, where)
    libraries = reductions(ranks, where)
    sizes = _messages(args.max_mb)
    total_mb = min(_GRADIENTS_MB, 1 << (args.max_mb.bit_length() - 1))
    buckets = [
        Message(f"bucket.{mb}", total_mb // mb, mb * 2**20, together=True)
        for mb in (2**k for k in range(total_mb.bit_length()))
    ]
    pairs = [(message, name) for message in sizes for name in libraries]
    pairs += [(message, "horovod") for message in buckets]
    largest = max(args.max_mb, total_mb) * 2**20 // 4
    memory = torch.empty(max(largest, _REPEAT_BYTES // 4), device=where)
    own = [[_time(m, name, libraries[name], memory, ranks) for m, name in pairs] for _ in range(args.rounds)]
    seconds = np.median(np.max(ranks.gather_json(own, name="bench.seconds"), axis=0), axis=0)
    torch_group.close_group()
    if not ranks.is_root:
        return {}
    by_pair = {(message.name, name): s for (message, name), s in zip(pairs, seconds.tolist(), strict=True)}
    about = {
        "ranks": ranks.size,
        "launch": ranks.kind,
        "device": where.type,
        "plane": data_plane(ranks, where),
        "fusion_bytes": int(os.environ["HOROVOD_FUSION_THRESHOLD"]),
        "cycle_ms": float(os.environ["HOROVOD_CYCLE_TIME"]),
        "rounds": args.rounds,
        "libraries": list(libraries),
    }
    return about | _of_sizes(sizes, by_pair, list(libraries), ranks.size) | _of_buckets(buckets, by_pair)


def _messages(max_mb: int) -> list[Message]:
    sizes = []
    size = _SMALLEST_BYTES
    while size <= max_mb * 2**20:
        repeats = max(1, min(_MOST_REPEATS, _REPEAT_BYTES // size))
        sizes.append(Message(f"size.{size}", repeats, size, together=False))
        size *= 4
    return sizes


def _time(
    message: Message, library: str, reduction: Reduction, memory: torch.Tensor, ranks: world.World
) -> float:
    """Seconds of one sum, or of one set of buckets.

    Raises:
        RuntimeError: a sum is wrong.
    """
    elements = message.bytes_each // 4
    used = memory[: message.count * elements]
    pattern = torch.arange(1024, device=memory.device, dtype=memory.dtype)
    used.view(-1, 1024)[:] = pattern * (ranks.rank + 1)
    buffers = list(used.split(elements))
    name = f"bench.{message.name}"
    groups = [buffers] if message.together else [[one] for one in buffers]
    # Brings the ranks as close together as this library can.
    reduction([torch.zeros(1, device=memory.device)], "bench.align")
    begin = time.perf_counter()
    for group in groups:
        reduction(group, name)
    if memory.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    expected = pattern * (ranks.size * (ranks.size + 1) // 2)
    # Whole numbers, exact in fp32 up to 180 ranks; above, sums round in each library's own order.
    if not torch.isclose(used.view(-1, 1024), expected, rtol=1e-5, atol=0).all():
        raise RuntimeError(f"{library}: {message.count} x {message.bytes_each} bytes: a sum is wrong")
    return seconds / len(groups)


def _of_sizes(
    sizes: list[Message], by_pair: dict[tuple[str, str], float], libraries: list[str], ranks: int
) -> dict[str, Any]:
    rows = []
    for message in sizes:
        seconds = {name: by_pair[message.name, name] for name in libraries}
        rate = {name: message.bytes_each / s for name, s in seconds.items()}
        rows.append(
            {
                "bytes": message.bytes_each,
                "us": {name: s * 1e6 for name, s in seconds.items()},
                "gb_per_s": {name: r / 1e9 for name, r in rate.items()},
                "bus_gb_per_s": {name: bus_bandwidth(r, ranks) / 1e9 for name, r in rate.items()},
            }
        )
    return {"sizes": rows, "latency_us": rows[0]["us"]}


def _of_buckets(buckets: list[Message], by_pair: dict[tuple[str, str], float]) -> dict[str, Any]:
    ms = {message.bytes_each // 2**20: 1000 * by_pair[message.name, "horovod"] for message in buckets}
    best_mb = min(mb for mb, one in ms.items() if one <= _AS_GOOD * min(ms.values()))
    toml = f"[parallel]\nbucket_mb = {best_mb}\nfusion_mb = {best_mb}"
    return {"gradients_mb": max(ms), "buckets": ms, "best_mb": best_mb, "toml": toml}
