"""Text continuation: one token id after another from a model with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from hvdlm.config import EXIT_CRASH, UserError


@final
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_p: the smallest set of likeliest tokens with this much probability is drawn from, (0, 1].
        seed: of the random numbers, which are drawn on the CPU, so that a GPU draws the same.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: needed a number of 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: needed a number above 0 and at most 1 (1 = all tokens)")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: needed an integer from 0 to 2^63 - 1")


@torch.inference_mode()
def continuation(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    vocab_size: int,
    seq_len: int,
) -> Iterator[int]:
    """Draw token ids after a prompt, without end.

    A model is only used at positions it was trained on: when `seq_len` tokens have been read, the newest
    half of them is read again from position 0, and so on. Of a longer prompt, the last `seq_len`
    tokens are read.

    Args:
        model: a model of `hvdlm.models.MODELS`, in evaluation mode.
        prompt_ids: at least one id below vocab_size.
        sampling: how to choose.
        vocab_size: ids from here on (padding) are never drawn.
        seq_len: tokens in a training sequence.

    Yields:
        Ids below vocab_size.

    Raises:
        UserError: the model's output is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.new_cache(1, seq_len)  # type: ignore[operator]
    seen = list(prompt_ids)[-seq_len:]
    unread = seen
    while True:
        if cache.length + len(unread) > seq_len:
            cache.clear()
            unread = seen = seen[-(seq_len // 2) :]
        logits = model(torch.tensor([unread], device=device), cache, last_only=True)
        token = choose(logits[0, -1, :vocab_size], sampling, generator)
        yield token
        unread = [token]
        seen = [*seen, token]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits_V: of the real vocabulary, on any device.
        sampling: temperature and top-p.
        generator: on the CPU.

    Raises:
        UserError: a logit is not a finite number.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1 (top-p).
    """
    logits_V = logits_V.float().cpu()
    if not logits_V.isfinite().all():
        raise UserError(
            "the model's output is not finite: its weights are damaged or diverged; use an older checkpoint",
            EXIT_CRASH,
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest is taken off first: a tiny temperature would make it infinite.
    probabilities = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        enough = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[ids[enough]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
