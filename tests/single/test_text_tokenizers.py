"""What holds for every tokenizer in TOKENIZERS."""

import hashlib

import numpy as np
import pytest

from hvdlm.config import UserError
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import Tokenizer, from_library

LOSSLESS = ("byte", "bpe")
NASTY = [
    "",
    "plain words, and more words",
    "\x00",
    "a\x00b\x00\x00",
    "line\r\nline\rline\n\n\n",
    "  \t  runs   of \u00a0 white \u3000 space   ",
    "人人生而自由,在尊严和权利上一律平等。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u0301 न्\u200dि",
    "\ufeffmark \u2028 \u2029 \x85 \x7f",
    "\U0010ffff\ue000",
    "<|endoftext|> </s> <EOS> <PAD><UNK>",
    "x" * 5000,
]
TEXTS = [*NASTY, "the cat sat on the mat and the cat saw the rat\n" * 20]


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name: str) -> Tokenizer:
    return from_library(TOKENIZERS[name](TEXTS, 0))


def test_ids_are_below_vocab_size_and_of_the_smallest_type(built: Tokenizer) -> None:
    for ids in built.encode_batch(NASTY):
        assert ids.dtype == built.dtype == np.uint16
        assert (ids < built.vocab_size).all()
    assert 0 <= built.eos_id < built.vocab_size


def test_text_never_becomes_a_special_token(name: str, built: Tokenizer) -> None:
    specials = {"byte": range(256, 259), "bpe": [0], "word": [0, 2, 3]}[name]
    texts = [
        f"a {token}b{token} {token}" for token in ("<|endoftext|>", "<EOS>", "<PAD>", "<SOS>", "<|pad|>")
    ]
    for ids in built.encode_batch(texts):
        assert not np.isin(ids, list(specials)).any()


def test_batch_equals_one_by_one(built: Tokenizer) -> None:
    together = built.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(ids, built.encode_batch([text])[0])
    assert built.encode_batch([]) == []


@pytest.mark.parametrize("lossless", LOSSLESS)
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_lossless_round_trip(lossless: str, text: str, trained: dict[str, Tokenizer]) -> None:
    [ids] = trained[lossless].encode_batch([text])
    assert trained[lossless].decode(ids) == text


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {name: from_library(build(["something else"], 0)) for name, build in TOKENIZERS.items()}


def test_lossy_ones_keep_their_ids(built: Tokenizer) -> None:
    for ids in built.encode_batch(TEXTS):
        np.testing.assert_array_equal(built.encode_batch([built.decode(ids)])[0], ids)


def test_same_texts_give_same_bytes_whatever_the_threads(
    name: str, built: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parallelism in ("true", "false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
        assert TOKENIZERS[name](iter(TEXTS), 0).to_str().encode() == built.json_bytes


def test_fingerprint_is_that_of_the_file_and_follows_the_vocabulary(name: str, built: Tokenizer) -> None:
    assert built.fingerprint == hashlib.sha256(built.json_bytes).hexdigest()
    other = from_library(TOKENIZERS[name](["other words, other merges; other words"], 0))
    assert (other.fingerprint == built.fingerprint) == (name == "byte")


@pytest.mark.parametrize(("name", "vocab_size"), [("byte", 256), ("word", 4), ("bpe", 256), ("bpe", 1 << 30)])
def test_impossible_vocab_size_is_refused(name: str, vocab_size: int) -> None:
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size}"):
        TOKENIZERS[name](TEXTS, vocab_size)


def test_word_order_is_frequency_then_code_point() -> None:
    library = TOKENIZERS["word"](["b a c b a b", "z\u0301 c"], 0)
    ordered = [library.id_to_token(id) for id in range(library.get_vocab_size())]
    assert ordered == ["<PAD>", "<UNK>", "<SOS>", "<EOS>", "b", "a", "c", "z\u0301"]
    small = from_library(TOKENIZERS["word"](["b a c b a b"], 6))
    assert small.vocab_size == 6
    assert [ids.tolist() for ids in small.encode_batch(["a b c"])] == [[5, 4, 1]]
    assert small.eos_id == 3


def test_words_are_runs_of_one_class() -> None:
    library = TOKENIZERS["word"](["<EOS> a,b... x_1\x00 e\u0301"], 0)
    assert {*library.get_vocab()} >= {"<", "EOS", ">", "a", ",", "b", "...", "x_1", "\x00", "e\u0301"}


def test_word_without_a_word_is_refused() -> None:
    with pytest.raises(UserError, match="no word"):
        TOKENIZERS["word"]([" \n"], 0)


def test_bpe_ids_are_bounded_and_eos_is_first() -> None:
    built = from_library(TOKENIZERS["bpe"](["lorem ipsum dolor sit amet " * 50], 270))
    assert built.vocab_size == 270
    assert built.eos_id == 0
