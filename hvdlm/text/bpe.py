"""Byte-level BPE trained on the input: lossless for every text, `<|endoftext|>` is id 0."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hvdlm.config import UserError
from hvdlm.text import byte
from hvdlm.text.pieces import cut_all, cut_runs

DEFAULT_VOCAB_SIZE = 32768
SMALLEST_VOCAB_SIZE = 256 + 1
LARGEST_VOCAB_SIZE = 1 << 24


def build(texts: Iterable[str], vocab_size: int = 0) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with GPT-2's splitting into words.

    Args:
        texts: the texts; read once, in order.
        vocab_size: tokens at most, the 256 bytes and `<|endoftext|>` included; 0 =
            `DEFAULT_VOCAB_SIZE`. A small input gives fewer: a merge needs a pair that occurs twice.

    Returns:
        A library tokenizer; the same texts give the same bytes, whatever the number of threads.

    Raises:
        UserError: a vocab_size that cannot be.
    """
    vocab_size = vocab_size or DEFAULT_VOCAB_SIZE
    if not SMALLEST_VOCAB_SIZE <= vocab_size <= LARGEST_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {vocab_size}: bpe needs {SMALLEST_VOCAB_SIZE} (256 bytes and <|endoftext|>) to "
            f"{LARGEST_VOCAB_SIZE}; the default is {DEFAULT_VOCAB_SIZE}"
        )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[byte.EOS],
        initial_alphabet=byte.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(cut_runs(cut_all(texts)), trainer)
    return library
