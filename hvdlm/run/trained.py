"""A trained model and what it was trained with, opened for use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from hvdlm.comm.device import pick
from hvdlm.config import DataConfig, TrainConfig
from hvdlm.config.parse import load_resolved
from hvdlm.models import MODELS, pad_vocab
from hvdlm.run.restore import Checkpoint
from hvdlm.text import tokenizer
from hvdlm.text.tokenizer import Tokenizer


@final
@dataclass(frozen=True)
class Trained:
    """What a command needs to use a trained model.

    Attributes:
        model: in evaluation mode, fp32.
        kind: of the model, a key of `MODELS`.
        data: the data section of its run.
        train: the training section of its run.
        tokenizer: of its data.
        eos_id: id that ends a document of its data.
        checkpoint: where the weights came from.
    """

    model: nn.Module
    kind: str
    data: DataConfig
    train: TrainConfig
    tokenizer: Tokenizer
    eos_id: int
    checkpoint: Checkpoint


def open_trained(checkpoint: Checkpoint, device: str = "cpu", *, local_rank: int = 0) -> Trained:
    """Build a model and fill it from a checkpoint.

    Args:
        checkpoint: from `hvdlm.run.restore.open_checkpoint`.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        local_rank: this process among those of its host, which decides its GPU.

    Raises:
        UserError: the checkpoint does not fit this version, or there is no such device.
    """
    target = pick(device, local_rank)
    config = load_resolved(checkpoint.config_path)
    text = tokenizer.load(checkpoint.tokenizer_path)
    model = MODELS[config.model.kind](config.model, pad_vocab(text.vocab_size))
    checkpoint.load_model_(model)
    # A corpus may have been encoded with an eos whose name the tokenizer alone does not tell.
    eos_id = int(checkpoint.state["eos_id"]) if "eos_id" in checkpoint.state else text.eos_id
    return Trained(
        model.to(target).eval(), config.model.kind, config.data, config.train, text, eos_id, checkpoint
    )
