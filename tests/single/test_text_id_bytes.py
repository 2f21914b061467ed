"""How much text the ids of a corpus stand for."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hvdlm.text import TOKENIZERS
from hvdlm.text.id_bytes import id_bytes
from hvdlm.text.tokenizer import Tokenizer, from_library

TEXTS = ["Plain text, twice: plain text.", "Grüße, 中文, 🦀\r\n\tand\0more", "", " leading  and   trailing "]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_it_is_exact_for_byte_level_tokenizers(name: str) -> None:
    tokenizer = from_library(TOKENIZERS[name](TEXTS * 3, 0 if name == "byte" else 300))
    counts = id_bytes(tokenizer)
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.eos_id] == 0
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert counts[ids].sum() == len(text.encode())


def test_it_is_within_a_space_of_the_truth_for_sentencepiece_and_its_bytes() -> None:
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁plain", "▁text", "▁", "ß", "s"]
    library = tokenizers.Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(library.to_str().encode())
    counts = id_bytes(tokenizer)
    for text in ("plain text", "plain ß texts 中 🦀"):
        (ids,) = tokenizer.encode_batch([text])
        assert len(np.unique(ids)) > 1
        assert counts[ids].sum() == len(text.encode()) + 1
    assert counts[[0, 1]].tolist()[1] == 0
