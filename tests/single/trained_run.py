"""A run folder made by the real training command, and models in memory, for the commands that use one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers

from hvdlm.config import DataConfig, ModelConfig, RunConfig
from hvdlm.models import pad_vocab
from hvdlm.models.transformer import Transformer
from hvdlm.run.restore import Checkpoint
from hvdlm.run.trained import Trained
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import Tokenizer, from_library
from tests import helpers

TEXTS = ["def main():\n    return 'héllo wörld' # 😀 自由\n"] * 30


def trained_once(tmp_path_factory, data: Path) -> Path:
    """A run of two steps, trained by whichever test asks first."""
    run = tmp_path_factory.getbasetemp() / "trained-run"
    if not run.exists():
        done = helpers.run(helpers.train_command(data, run, "--train.steps", "2"))
        assert done.returncode == 0, done.stdout
    return run


def in_memory(kind: str, *, seq_len: int = 32, **changes) -> Trained:
    """An untrained model with weights large enough that texts vary, and a tokenizer of that kind."""
    torch.manual_seed(0)
    tokenizer = fallback_tokenizer() if kind == "fallback" else build_tokenizer(kind)
    config = ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "kv_heads": 2} | changes)
    model = Transformer(config, pad_vocab(tokenizer.vocab_size)).eval()
    for weight in model.parameters():
        weight.data *= 8 if weight.dim() == 2 else 1
    run = RunConfig(model=config, data=DataConfig(seq_len=seq_len))
    checkpoint = Checkpoint(Path("nowhere"), {}, {"step": 7})
    return Trained(model, run.model.kind, run.data, run.train, tokenizer, tokenizer.eos_id, checkpoint)


def build_tokenizer(kind: str) -> Tokenizer:
    return from_library(TOKENIZERS[kind](TEXTS, 0 if kind == "byte" else 300))


def fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has it: pieces with a visible space, bytes as `<0x41>`, and `</s>`."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁wör"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "</s>"])
    return from_library(library)
