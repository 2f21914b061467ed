"""Training steps whose attention stays within documents beside steps without `data.document_mask`."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.bench.bare import wait_for
from hvdlm.comm import device
from hvdlm.config import ModelConfig, UserError
from hvdlm.models import MODELS
from hvdlm.models.compilation import compile_blocks_
from hvdlm.parallel.forward import autocast

VOCAB = 4096
_HEAD = 64
# Compilation, and what the first steps allocate.
_WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench mask`."""
    parser.add_argument("--rounds", type=int, default=20, help="pairs of steps in turn (default: 20)")
    parser.add_argument("--layers", type=int, default=3, help="blocks of the model (default: 3)")
    parser.add_argument(
        "--width", type=int, default=128, help=f"of the model, whose heads have {_HEAD} (default: 128)"
    )
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument(
        "--document-tokens",
        type=int,
        nargs="+",
        default=[512],
        help="mean lengths of documents, which are drawn at random (default: 512)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="to compute in (default: fp32)"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time forward and backward passes of one model on this process's device, with positions and without.

    Returns:
        What was measured, `plain_ms`, and of each mean length in `documents` its median `ms` a step and
        `ratio`, the median over the rounds of its time by that of the step without, with its quartiles.

    Raises:
        UserError: an option is out of range.
    """
    counts = (args.layers, args.width, args.seq_len, args.micro_batch, *args.document_tokens)
    if min(counts) < 1 or args.rounds < 2 or args.width % _HEAD:
        raise UserError(
            f"bench mask: --rounds is 2 or more, --width a multiple of {_HEAD}, all else 1 or more"
        )
    here = device.pick("auto", 0)
    torch.manual_seed(0)
    heads = args.width // _HEAD
    config = ModelConfig(layers=args.layers, width=args.width, heads=heads, compile=args.compile)
    # Each has its own, so that no graph is compiled for both.
    plain = MODELS[config.kind](config, VOCAB).to(here)
    masked = copy.deepcopy(plain)
    if args.compile:
        compile_blocks_(plain)
        compile_blocks_(masked)
    plain_s: list[float] = []
    masked_s: dict[int, list[float]] = {tokens: [] for tokens in args.document_tokens}
    for _ in range(args.rounds + _WARM_UP):
        ids = torch.randint(VOCAB, (args.micro_batch, args.seq_len + 1)).to(here)
        plain_s.append(_time(plain, ids, None, args.precision))
        for tokens, seconds in masked_s.items():
            positions = packed_positions(args.micro_batch, args.seq_len, tokens).to(here)
            seconds.append(_time(masked, ids, positions, args.precision))
    return {
        "device": torch.cuda.get_device_name(here) if here.type == "cuda" else here.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "compiled": args.compile,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "shape": [args.micro_batch, args.seq_len],
        "plain_ms": 1000 * statistics.median(plain_s[_WARM_UP:]),
        "documents": [_row(n, plain_s[_WARM_UP:], s[_WARM_UP:]) for n, s in masked_s.items()],
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    batch, seq_len = result["shape"]
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, {batch} sequences of {seq_len} tokens, "
        f"{result['device']}, {result['threads']} thread(s), {result['precision']}"
        f"{', compiled' if result['compiled'] else ''}, torch {result['torch']}",
        f"{'document_mask':<24}{'ms a step':>10}{'x without':>11}  quartiles",
        f"{'false':<24}{result['plain_ms']:>10.1f}{1:>11.3f}",
    ]
    for row in result["documents"]:
        low, high = row["quartiles"]
        name = f"documents of {row['tokens']}"
        lines.append(f"{name:<24}{row['ms']:>10.1f}{row['ratio']:>11.3f}  {low:.3f} {high:.3f}")
    return "\n".join(lines)


def packed_positions(batch: int, seq_len: int, document_tokens: int) -> Tensor:
    """As a loader gives them, of documents that end after each token with the same probability.

    Returns:
        int64 [batch, seq_len], the place of each token in its document.
    """
    begins = torch.rand(batch, seq_len) < 1 / document_tokens
    begins[:, 0] = True
    numbers = torch.arange(seq_len).expand(batch, seq_len)
    return numbers - torch.where(begins, numbers, 0).cummax(1).values


def _time(model: nn.Module, ids: Tensor, positions: Tensor | None, precision: str) -> float:
    wait_for(ids.device)
    begin = time.perf_counter()
    with autocast(ids.device, precision):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:], positions)  # type: ignore[operator]
    (loss / ids[:, 1:].numel()).backward()
    wait_for(ids.device)
    seconds = time.perf_counter() - begin
    model.zero_grad()
    if not math.isfinite(loss.item()):
        raise RuntimeError("the loss of a benchmark step is not finite")
    return seconds


def _row(tokens: int, plain_s: list[float], masked_s: list[float]) -> dict[str, Any]:
    ratios = [mine / theirs for mine, theirs in zip(masked_s, plain_s, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ms = 1000 * statistics.median(masked_s)
    return {"tokens": tokens, "ms": ms, "ratio": middle, "quartiles": [low, high]}
