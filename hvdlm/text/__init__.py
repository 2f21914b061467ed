"""TEXT <-> INTEGERS: one loader of `tokenizer.json`, and a builder for each kind.

To add a tokenizer: write `text/x.py` with ``build(texts, vocab_size)`` and add a line here.
"""

from collections.abc import Callable, Iterable

import tokenizers

from hvdlm.text import bpe, byte, word

TOKENIZERS: dict[str, Callable[[Iterable[str], int], tokenizers.Tokenizer]] = {
    "byte": byte.build,
    "word": word.build,
    "bpe": bpe.build,
}
