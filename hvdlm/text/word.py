"""The word tokenizer: `<PAD> <UNK> <SOS> <EOS>` are 0..3, then words, the most frequent first.

A word is a run of letters, digits, marks and underscores, or a run of other characters; white
space only separates. No word mixes the two, so text can never spell a special token. Decoding
joins words with one space, so ``encode(decode(ids)) == ids`` wherever no `<UNK>` is; the text
itself is not preserved.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from hvdlm.config import UserError
from hvdlm.text.bpe import LARGEST_VOCAB_SIZE
from hvdlm.text.pieces import cut_all

SPECIALS = ("<PAD>", "<UNK>", "<SOS>", "<EOS>")
DEFAULT_VOCAB_SIZE = 32768


def build(texts: Iterable[str], vocab_size: int = 0) -> tokenizers.Tokenizer:
    """Count the words of some texts; equal counts are ordered by code point.

    Args:
        texts: the texts; read once, in order.
        vocab_size: tokens at most, the four special ones included; 0 = `DEFAULT_VOCAB_SIZE`.

    Returns:
        A library tokenizer; the same texts give the same bytes.

    Raises:
        UserError: a vocab_size that leaves no room for a word, or texts without a word.
    """
    vocab_size = vocab_size or DEFAULT_VOCAB_SIZE
    if not len(SPECIALS) < vocab_size <= LARGEST_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {vocab_size}: word needs more than its {len(SPECIALS)} special tokens, at most "
            f"{LARGEST_VOCAB_SIZE}; the default is {DEFAULT_VOCAB_SIZE}"
        )
    library = tokenizers.Tokenizer(models.WordLevel({}, unk_token="<UNK>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=1, special_tokens=list(SPECIALS), show_progress=False
    )
    library.train_from_iterator(cut_all(texts), trainer)
    if library.get_vocab_size() <= len(SPECIALS):
        raise UserError("--tokenizer word: the input has no word to count; give it some text")
    return library
