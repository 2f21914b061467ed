"""What rank 0 writes while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hvdlm.comm.world import World
from hvdlm.config import RunConfig, total_steps
from hvdlm.run.folder import Start
from hvdlm.run.ledger import Ledger
from hvdlm.run.metrics import Metrics


@dataclass(frozen=True)
class Reports:
    """What rank 0 writes while a run goes on."""

    ledger: Ledger
    metrics: Metrics


def open_reports(
    config: RunConfig, run_folder: Path, start: Start, *, ranks: World, model: nn.Module
) -> Reports:
    """Open the files of one attempt; for rank 0."""
    metrics = Metrics(
        run_folder,
        attempt=start.attempt,
        steps=total_steps(config),
        tokens_per_step=config.train.global_batch * config.data.seq_len,
        flops_per_token=_flops_per_token(model, config.data.seq_len),
        world_size=ranks.size,
        device=next(model.parameters()).device,
    )
    if config.log.tensorboard:
        metrics.open_board(run_folder / "tensorboard")
    metrics.open_bar(start.step)
    ledger = Ledger(
        run_folder,
        attempt=start.attempt,
        resumed_at=start.step + 1,
        micro_batch=config.train.micro_batch,
    )
    return Reports(ledger, metrics)


def _flops_per_token(model: nn.Module, seq_len: int) -> int:
    """What the model says of itself; 0 where it does not say, and then no MFU is shown."""
    count = getattr(model, "flops_per_token", None)
    return int(count(seq_len)) if callable(count) else 0
