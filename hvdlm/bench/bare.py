"""What a person writes who trains a model with PyTorch and nothing else, in one process, which is its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn

from hvdlm.config import ModelConfig, OptimConfig
from hvdlm.models import MODELS, pad_vocab
from hvdlm.models.compilation import compile_blocks_
from hvdlm.parallel.forward import autocast

Steps = list[list[np.ndarray]]
"""Of each step its micro-batches, int64 [B, T + 1]."""


@dataclass(frozen=True)
class Bare:
    """What is trained and how: `precision` 'fp32', or 'bf16' for autocast; compiled where `model` says so."""

    model: ModelConfig
    optim: OptimConfig
    vocab_size: int
    precision: str
    device: torch.device


@contextmanager
def bare_loop(bare: Bare, steps: Steps) -> Iterator[Connection]:
    """Start the loop in a process of its own, with as many threads as this one has.

    Args:
        bare: what it trains.
        steps: on what, all of it on the device from the beginning.

    Yields:
        A connection: for each object sent it trains on all `steps` once and sends what it took,
        the seconds by the clock and those of CPU time over all threads.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, bare, steps, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, bare: Bare, steps: Steps, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MODELS[bare.model.kind](bare.model, pad_vocab(bare.vocab_size)).to(bare.device)
    if bare.model.compile:
        compile_blocks_(model)
    optim = bare.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    batches = [[torch.from_numpy(ids).to(bare.device) for ids in step] for step in steps]
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for batch in batches:
            _step(model, optimizer, batch, clip=optim.clip, precision=bare.precision)
        wait_for(bare.device)
        connection.send((time.perf_counter() - begin_s, time.process_time() - begin_cpu_s))


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: list[torch.Tensor],
    *,
    clip: float,
    precision: str,
) -> None:
    labels = sum(ids[:, 1:].numel() for ids in batch)
    for ids in batch:
        with autocast(ids.device, precision):
            loss, _ = model.loss(ids[:, :-1], ids[:, 1:])  # type: ignore[operator]
        (loss / labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
