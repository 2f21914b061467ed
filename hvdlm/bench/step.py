"""Optimizer steps under every strategy; with one process also the training loop beside a bare loop."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hvdlm.bench import loop, strategies
from hvdlm.comm import launch, world
from hvdlm.config import ModelConfig, ParallelConfig, UserError
from hvdlm.data.files import write_atomic
from hvdlm.parallel.choice import FILE as RESULT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench step`."""
    parser.add_argument("--blocks", type=int, default=20, help="timed blocks of each kind (default: 20)")
    parser.add_argument("--block-steps", type=int, default=10, help="steps a block of the loop (default: 10)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a micro-batch (default: 4)")
    parser.add_argument("--slots", type=int, default=1, help="micro-batches a rank and step (default: 1)")
    parser.add_argument("--layers", type=int, default=0, help="blocks of the model, with --width")
    parser.add_argument(
        "--width",
        type=int,
        default=0,
        help="of the model, whose heads have 64 (default: the demo, and 6 blocks of 384 for the strategies)",
    )
    parser.add_argument("--seq-len", type=int, default=1024, help="with --width (default: 1024)")
    parser.add_argument("--compile", action="store_true", help="with --width: compile the blocks")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="to compute in (default: fp32)"
    )
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB a bucket (default: 25)")
    parser.add_argument(
        "--wires",
        nargs="+",
        default=["none"],
        choices=["none", "fp16", "bf16"],
        help="precisions on the wire",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(RESULT),
        help=f"where parallel.strategy=auto looks (default: {RESULT})",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the strategies on all ranks; alone, the training loop too.

    Returns:
        `strategies`, and of one process `loop`; empty on other ranks than 0.

    Raises:
        UserError: an option is out of range, or the result cannot be written.
    """
    if bool(args.width) != bool(args.layers) or args.width % 64:
        raise UserError("bench step: --layers and --width go together, and --width is a multiple of 64")
    if min(args.blocks, args.block_steps, args.micro_batch, args.slots) < 1 or args.blocks < 2:
        raise UserError("bench step: --blocks must be 2 or more, the other counts 1 or more")
    # A bucket as large as the fusion buffer is reduced in place, and allreduce fuses to the same size.
    parallel = ParallelConfig(bucket_mb=args.bucket_mb, fusion_mb=max(1, int(args.bucket_mb)))
    here = launch.classify(os.environ)
    cores = len(os.sched_getaffinity(0))
    settings = launch.process_settings(
        here, parallel, env=os.environ, cores=cores, gpus=torch.cuda.device_count()
    )
    ranks = world.init(here, settings, meeting=args.out.parent)
    result: dict[str, Any] = {}
    if ranks.size == 1:
        result["loop"] = loop.measure(
            blocks=args.blocks, block_steps=args.block_steps, ranks=ranks, flags=_flags(args)
        )
    result["strategies"] = strategies.measure(
        ranks,
        blocks=args.blocks,
        wires=args.wires,
        parallel=parallel,
        work=_work(args),
    )
    if ranks.is_root and ranks.size > 1:
        _write(args.out, result["strategies"])
    ranks.close()
    return result if ranks.is_root else {}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    parts = [loop.table(result["loop"])] if "loop" in result else []
    return "\n\n".join([*parts, strategies.table(result["strategies"])])


def _work(args: argparse.Namespace) -> strategies.Work:
    """What the strategies do in a step."""
    work = strategies.Work(args.slots, args.micro_batch, precision=args.precision)
    if not args.width:
        return work
    model = ModelConfig(layers=args.layers, width=args.width, heads=args.width // 64, compile=args.compile)
    return replace(work, model=model, seq_len=args.seq_len)


def _flags(args: argparse.Namespace) -> list[str]:
    """What makes of the demo's run one of that model."""
    flags = {"train.precision": args.precision}
    if args.width:
        heads = args.width // 64
        flags |= {"model.layers": args.layers, "model.width": args.width, "data.seq_len": args.seq_len}
        flags |= {"model.heads": heads, "model.kv_heads": heads, "model.compile": str(args.compile).lower()}
        batch = args.micro_batch * args.slots
        flags |= {
            "train.micro_batch": args.micro_batch,
            "train.global_batch": batch,
            "optim.lr": 1e-4,
            "optim.min_lr": 1e-5,
        }
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another --out") from error
