"""The byte tokenizer: id == UTF-8 byte for 0..255, then the special tokens.

It is an ordinary byte-level BPE without merges, so every program that reads `tokenizer.json` reads
it. The library encodes it at about 1.5 MB/s; `is_byte` recognises such a file by its content,
and `hvdlm.text.tokenizer` then takes the bytes themselves as ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hvdlm.config import UserError

EOS = "<|endoftext|>"
SPECIALS = (EOS, "<|pad|>", "<|startoftext|>")
VOCAB_SIZE = 256 + len(SPECIALS)


def alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers.

    Printable Latin-1 bytes stand for themselves, the others are moved to U+0100 and up.

    Returns:
        256 one-character strings, indexed by byte.

    Source: GPT-2's `bytes_to_unicode`; the same table as `ByteLevel.alphabet()` in `tokenizers`,
    which gives it without its order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def build(texts: Iterable[str], vocab_size: int = 0) -> tokenizers.Tokenizer:
    """Make the byte tokenizer; it is the same for every input.

    Args:
        texts: not read.
        vocab_size: 0 or `VOCAB_SIZE`.

    Returns:
        A library tokenizer with 256 bytes and the special tokens from id 256 on.

    Raises:
        UserError: another vocab_size.
    """
    del texts
    if vocab_size not in (0, VOCAB_SIZE):
        raise UserError(
            f"--vocab-size {vocab_size}: the byte tokenizer has exactly {VOCAB_SIZE} tokens; leave it out, "
            "or choose --tokenizer bpe"
        )
    library = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in enumerate(alphabet())}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIALS))
    return library


def is_byte(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer maps every text to exactly its UTF-8 bytes.

    Args:
        spec: a parsed `tokenizer.json`.

    Returns:
        True for a byte-level BPE without merges, normalizer and ordinary added tokens whose ids
        are the bytes. Special tokens do not matter: they are never taken from text.
    """
    model, splitter = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    plain_model = model.get("type") == "BPE" and not (
        model.get("merges")
        or model.get("ignore_merges")
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    )
    plain_splitter = splitter.get("type") == "ByteLevel" and splitter.get("add_prefix_space") is False
    added = spec.get("added_tokens") or []
    plain_added = all(token.get("special") and token.get("id", 0) > 255 for token in added)
    if not (plain_model and plain_splitter and plain_added) or spec.get("normalizer"):
        return False
    vocab = {char: id for char, id in model.get("vocab", {}).items() if id < 256}
    return vocab == {char: byte for byte, char in enumerate(alphabet())}


def encode(text: str) -> np.ndarray:
    """Encode without the library.

    Args:
        text: without lone surrogates.

    Returns:
        uint16 [bytes]: the UTF-8 bytes.
    """
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
