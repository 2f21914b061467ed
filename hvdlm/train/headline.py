"""What a run says of itself before its first step."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hvdlm import __version__
from hvdlm.comm.world import World
from hvdlm.config import RunConfig, total_steps
from hvdlm.data.manifest import Manifest
from hvdlm.run.folder import Start


def headline(
    config: RunConfig, run_folder: Path, start: Start, *, ranks: World, model: nn.Module
) -> list[str]:
    """What runs where, and from where it starts."""
    parameters = sum(p.numel() for p in model.parameters())
    where = next(model.parameters()).device
    begin = f"resumed from {start.checkpoint}" if start.checkpoint else "from the beginning"
    return [
        f"hvdlm {__version__}: {config.model.kind} of {parameters / 1e6:.2f} M parameters, "
        f"{config.train.precision} on {where.type}, {ranks.size} rank(s) ({ranks.kind}), "
        f"strategy {config.parallel.strategy}",
        f"run folder {run_folder}, attempt {start.attempt}, {begin}",
        *start.notes,
    ]


def sizes(config: RunConfig, manifest: Manifest, *, windows: int, ranks: World) -> list[str]:
    """How much data there is, how much of it the run takes, and whether the ranks share it evenly."""
    train, steps = config.train, total_steps(config)
    slots = train.global_batch // train.micro_batch
    lines = [
        f"data {config.data.path}: {manifest.tokens('train'):,} training tokens in "
        f"{len(manifest.split('train'))} shard(s), {windows:,} samples of {config.data.seq_len}",
        f"{steps} steps of {train.global_batch} samples in {slots} micro-batches: "
        f"{steps * train.global_batch * config.data.seq_len:,} tokens, "
        f"{steps * train.global_batch / windows:.2f} epochs",
    ]
    if slots % ranks.size:
        lines.append(
            f"warning: {slots} micro-batches do not divide over {ranks.size} ranks, so some wait for others; "
            "make train.global_batch / train.micro_batch a multiple of the ranks"
        )
    return lines
