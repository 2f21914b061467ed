"""Models: tensors of token ids to a loss.

A model is an `nn.Module` built from the model section and a padded vocabulary size, with
`loss(tokens, labels, positions=None) -> (fp32 sum, count)`,
`forward(tokens, cache=None, *, last_only=False, positions=None)`, `new_cache(batch, positions)` and
`flops_per_token(seq_len)`; what `model.compile` compiles is in `blocks`. Given `positions`, of each token
in its document, a token sees its document alone. To add one: a module here, a line in `MODELS`, its kind
in `ModelConfig`;
tests/single/test_models_conformance.py then tests it.
"""

from collections.abc import Callable

from torch import nn

from hvdlm.config import ModelConfig
from hvdlm.models.transformer import Transformer

MODELS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {"transformer": Transformer}

VOCAB_MULTIPLE = 64


def pad_vocab(vocab_size: int) -> int:
    """Rows of the embedding for a vocabulary: the next multiple of 64, which matrix units want.

    Args:
        vocab_size: the tokenizer's largest id + 1.
    """
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
