"""What a person writes who trains a model on one CPU with PyTorch and nothing else; in its own process."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn

from hvdlm.config import ModelConfig, OptimConfig
from hvdlm.models import MODELS, pad_vocab

Steps = list[list[np.ndarray]]
"""Of each step its micro-batches, int64 [B, T + 1]."""


@contextmanager
def bare_loop(
    model: ModelConfig, optim: OptimConfig, *, vocab_size: int, steps: Steps
) -> Iterator[Connection]:
    """Start the loop in a process of its own, with as many threads as this one has.

    Yields:
        A connection: for each object sent it trains on all `steps` once and sends what it took,
        the seconds by the clock and those of CPU time over all threads.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, model, optim, vocab_size, steps, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(
    connection: Connection,
    model_config: ModelConfig,
    optim: OptimConfig,
    vocab_size: int,
    steps: Steps,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MODELS[model_config.kind](model_config, pad_vocab(vocab_size))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    batches = [[torch.from_numpy(ids) for ids in step] for step in steps]
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for batch in batches:
            _step(model, optimizer, batch, clip=optim.clip)
        connection.send((time.perf_counter() - begin_s, time.process_time() - begin_cpu_s))


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor], *, clip: float
) -> None:
    labels = sum(ids[:, 1:].numel() for ids in batch)
    for ids in batch:
        (model.loss(ids[:, :-1], ids[:, 1:])[0] / labels).backward()  # type: ignore[operator]
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
