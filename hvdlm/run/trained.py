"""A trained model and what it was trained with, opened for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import nn

from hvdlm.comm.device import pick
from hvdlm.config import RunConfig
from hvdlm.config.parse import load_resolved
from hvdlm.models import MODELS, pad_vocab
from hvdlm.run.restore import Checkpoint, open_checkpoint
from hvdlm.text import tokenizer
from hvdlm.text.tokenizer import Tokenizer


@final
@dataclass(frozen=True)
class Trained:
    """What a command needs to use a trained model.

    Attributes:
        model: in evaluation mode, fp32.
        config: of its run.
        tokenizer: of its data.
        eos_id: id that ends a document of its data.
        checkpoint: where the weights came from.
    """

    model: nn.Module
    config: RunConfig
    tokenizer: Tokenizer
    eos_id: int
    checkpoint: Checkpoint


def open_trained(path: Path, device: str = "cpu", *, local_rank: int = 0) -> Trained:
    """Open a checkpoint folder, or the newest valid checkpoint of a run folder.

    Args:
        path: the folder.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        local_rank: this process among those of its host, which decides its GPU.

    Raises:
        UserError: no valid checkpoint there, or no such device.
    """
    target = pick(device, local_rank)
    checkpoint = open_checkpoint(path)
    config = load_resolved(checkpoint.config_path)
    text = tokenizer.load(checkpoint.tokenizer_path)
    model = MODELS[config.model.kind](config.model, pad_vocab(text.vocab_size))
    checkpoint.load_model_(model)
    # A corpus may have been encoded with an eos whose name the tokenizer alone does not tell.
    eos_id = int(checkpoint.state["eos_id"]) if "eos_id" in checkpoint.state else text.eos_id
    return Trained(model.to(target).eval(), config, text, eos_id, checkpoint)
