"""What a run says of itself before its first step."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hvdlm import __version__
from hvdlm.comm.world import World
from hvdlm.config import RunConfig, total_steps
from hvdlm.data.sources import Source
from hvdlm.run.folder import Start
from hvdlm.run.stages import drawn_before


def headline(
    config: RunConfig, run_folder: Path, start: Start, *, ranks: World, model: nn.Module
) -> list[str]:
    """What runs where, and from where it starts."""
    parameters = sum(p.numel() for p in model.parameters())
    where = next(model.parameters()).device
    begin = "from the beginning"
    if start.step:
        kept = f"goes on in memory after step {start.step}"
        begin = f"resumed from {start.checkpoint}" if start.checkpoint else kept
    return [
        f"hvdlm {__version__}: {config.model.kind} of {parameters / 1e6:.2f} M parameters, "
        f"{config.train.precision} on {where.type}, {ranks.size} rank(s) ({ranks.kind}), "
        f"strategy {config.parallel.strategy}",
        f"run folder {run_folder}, attempt {start.attempt}, {begin}",
        *start.notes,
        *(_about_timeline(timeline_path(run_folder, start.attempt), ranks) if config.log.timeline else []),
    ]


def timeline_path(run_folder: Path, attempt: int) -> Path:
    """Where Horovod's timeline of an attempt lies."""
    return run_folder / f"timeline-{attempt}.json"


def _about_timeline(path: Path, ranks: World) -> list[str]:
    if ranks.size == 1:
        return ["warning: log.timeline: one process sends nothing, so Horovod's timeline is not written"]
    return [f"Horovod's timeline: {path}; open it in https://ui.perfetto.dev"]


def sizes(
    config: RunConfig, sources: list[Source], start: Start, *, windows: list[int], ranks: World
) -> list[str]:
    """How much data there is, how much of it the run takes, and whether the ranks share it evenly.

    Args:
        config: of the run.
        sources: what it reads.
        start: of this attempt.
        windows: samples an epoch of each source.
        ranks: of the run.
    """
    train, steps = config.train, total_steps(config)
    slots, stage = train.global_batch // train.micro_batch, start.stages[-1]
    drawn = drawn_before(start.stages, steps * train.global_batch, seed=train.seed)
    total = sum(s.weight for s in stage.sources)
    lines = [
        f"data {source.folder}: {source.manifest.tokens('train'):,} training tokens in "
        f"{len(source.manifest.split('train'))} shard(s), {n:,} samples of {config.data.seq_len}, "
        + (f"weight {part.weight} of {total}, " if len(sources) > 1 else "")
        + f"{drawn[part.fingerprint] / n:.2f} epochs"
        for source, part, n in zip(sources, stage.sources, windows, strict=True)
    ]
    lines.append(
        f"{steps} steps of {train.global_batch} samples in {slots} micro-batches: "
        f"{steps * train.global_batch * config.data.seq_len:,} tokens"
    )
    if slots % ranks.size:
        lines.append(
            f"warning: {slots} micro-batches do not divide over {ranks.size} ranks, so some wait for others; "
            "make train.global_batch / train.micro_batch a multiple of the ranks"
        )
    return lines
