"""How much text an id stands for: what is left to count where only the ids of a corpus are at hand."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from hvdlm.text.tokenizer import Tokenizer

_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


def id_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text that each id adds to a document.

    Exact for byte-level tokenizers, whatever the text. For others it is what the id adds inside a
    text, so a decoder that treats the first word of a text otherwise makes it a byte or so too much.

    Args:
        tokenizer: Any.

    Returns:
        int64 [vocab_size]; 0 for special tokens and ids that nothing has.
    """
    spec = json.loads(tokenizer.json_bytes)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    model = spec["model"]["vocab"]
    pairs = model.items() if isinstance(model, dict) else ((entry[0], i) for i, entry in enumerate(model))
    decoders = _kinds(spec.get("decoder"))
    for name, id in pairs:
        if "ByteLevel" in decoders:
            counts[id] = len(name)  # Each character stands for one byte.
        elif "ByteFallback" in decoders and _BYTE_NAME.fullmatch(name):
            counts[id] = 1
        else:
            once, twice = tokenizer.decode([id]), tokenizer.decode([id, id])
            counts[id] = max(0, len(twice.encode()) - len(once.encode()))
    for token in spec.get("added_tokens") or []:
        counts[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    counts[tokenizer.eos_id] = 0
    return counts


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder and of all in it."""
    if not decoder:
        return set()
    return {decoder.get("type", "")}.union(*(_kinds(part) for part in decoder.get("decoders", [])))
