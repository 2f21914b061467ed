"""The fast encoder: equal ids or not used; the choice is made once."""

import json
import random
from typing import Any

import gigatoken
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from hvdlm.config import UserError
from hvdlm.text import TOKENIZERS, fast, gigatoken_encoder
from hvdlm.text.gigatoken_encoder import GigatokenEncoder
from hvdlm.text.pieces import PIECE_CHARS
from hvdlm.text.proof import HARD, first_difference
from hvdlm.text.tokenizer import Tokenizer, from_library

TEXTS = [*HARD, "the cat sat on the mat and the cat saw the rat\n" * 20]


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    return from_library(TOKENIZERS["bpe"](TEXTS, 400))


@pytest.fixture(scope="module")
def chosen(reference: Tokenizer) -> Tokenizer:
    choice = fast.check(reference, TEXTS)
    assert choice == {"encoder": "gigatoken", "version": gigatoken_encoder.version()}
    assert fast.line(choice) == ""
    return fast.follow(reference, json.loads(json.dumps(choice)))


def assert_equal(reference: Tokenizer, chosen: Tokenizer, texts: list[str]) -> None:
    for text, a, b in zip(texts, reference.encode_batch(texts), chosen.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=ascii(text[:40]))
        assert a.dtype == b.dtype == reference.dtype


def test_ids_are_those_of_the_reference(reference: Tokenizer, chosen: Tokenizer) -> None:
    source = random.Random(0)
    points = [[source.randrange(0x110000) >> source.randrange(16) for _ in range(200)] for _ in range(200)]
    wild = ["".join(chr(p) for p in some if not 0xD800 <= p < 0xE000) for some in points]
    assert_equal(reference, chosen, [*TEXTS, *wild])
    assert chosen.fingerprint == reference.fingerprint
    assert chosen.eos_id == reference.eos_id


def test_it_is_the_fast_encoder_that_encodes(chosen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_library", None)
    assert chosen.encode_batch(["the cat"])[0].size


def test_every_character_cuts_alike(reference: Tokenizer, chosen: Tokenizer) -> None:
    points = [p for p in range(0x32000) if not 0xD800 <= p < 0xE000]
    texts = [
        "".join(f"a{chr(p)}(C {chr(p)}\n1{chr(p)}11" for p in points[i : i + 2000])
        for i in range(0, len(points), 2000)
    ]
    assert_equal(reference, chosen, texts)


def test_text_never_makes_a_special_token(reference: Tokenizer, chosen: Tokenizer) -> None:
    texts = ["a <|endoftext|>b<|endoftext|>", "<|endoftext|>"]
    assert_equal(reference, chosen, texts)
    assert not any((ids == chosen.eos_id).any() for ids in chosen.encode_batch(texts))
    alone = GigatokenEncoder(chosen.json_bytes).encode(texts[0])
    assert alone is not None
    assert not (alone == chosen.eos_id).any()


def test_long_texts_are_cut_by_the_same_rule(reference: Tokenizer, chosen: Tokenizer) -> None:
    assert_equal(reference, chosen, ["the cat \u4e2d\u6587\n" * (PIECE_CHARS // 9), "x" * (PIECE_CHARS + 7)])


def test_characters_of_a_later_unicode_go_to_the_reference(chosen: Tokenizer) -> None:
    encoder = GigatokenEncoder(chosen.json_bytes)
    assert encoder.encode("\U0001f469 \u4e2d") is not None
    for rare in ("\U00032000", "\U000323b0", "\U000e0100", "\U0010ffff"):
        assert encoder.encode(f"a{rare}") is None


def test_caches_are_dropped_when_memory_grows(chosen: Tokenizer) -> None:
    letters = str.maketrans("0123456789", "ghijklmnop")
    numbers = [range(start, start + 50_000) for start in range(0, 1_500_000, 50_000)]
    texts = [" ".join(f"{n * 2654435761 % 2**40:010x}" for n in some).translate(letters) for some in numbers]
    bounded, free = (GigatokenEncoder(chosen.json_bytes, growth_bytes=size) for size in (32 << 20, 1 << 40))
    opened = 0
    for text in texts:
        ids = bounded.encode(text)
        opened += bounded.bound_memory()
        assert not free.bound_memory()
        np.testing.assert_array_equal(ids, free.encode(text))
    assert opened >= 1


def test_a_difference_in_the_sample_refuses_it(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = GigatokenEncoder.encode

    def wrong(self: GigatokenEncoder, text: str) -> Any:
        ids = encode(self, text)
        return ids[:-1] if ids is not None and text == "only here" else ids

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    assert fast.check(reference, TEXTS)["encoder"] == "gigatoken"
    choice = fast.check(reference, [*TEXTS, "only here"])
    assert choice["encoder"] == "reference"
    assert fast.line(choice).endswith("gives other ids for 'only here'")
    assert fast.follow(reference, choice) is reference


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_are_compared_too(special: bool) -> None:
    library = TOKENIZERS["bpe"](TEXTS, 400)
    library.add_tokens([AddedToken("<br>", special=special, lstrip=True)])
    built = from_library(library)
    choice = fast.check(built, [])
    assert_equal(built, fast.follow(built, choice), ["a <br>b", "a<br> <br>"])


def test_a_tokenizer_that_it_cannot_read_is_told_in_one_line() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    choice = fast.check(from_library(library), ["a a"])
    assert choice["encoder"] == "reference"
    assert fast.line(choice).startswith(
        "encoding with Hugging Face tokenizers, not the fast encoder: gigatoken"
    )
    assert "\n" not in fast.line(choice)


def test_bytes_need_no_encoder() -> None:
    assert fast.check(from_library(TOKENIZERS["byte"]([], 0)), ["a"]) == fast.REFERENCE
    assert fast.line(fast.REFERENCE) == ""


def test_a_machine_without_it(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "version", lambda: "")
    choice = fast.check(reference, TEXTS)
    assert choice["encoder"] == "reference"
    assert "pip install gigatoken" in fast.line(choice)
    with pytest.raises(UserError, match=r"has gigatoken not at all, but this run was planned with 0\.10\.0"):
        fast.follow(reference, {"encoder": "gigatoken", "version": "0.10.0"})


def test_first_difference_is_the_first() -> None:
    def lengths(texts: Any) -> list[np.ndarray]:
        return [np.array([len(text)]) for text in texts]

    def at_most_two(texts: Any) -> list[np.ndarray]:
        return [np.array([min(len(text), 2)]) for text in texts]

    assert first_difference(lengths, at_most_two, ["a", "bbb", "cccc"]) == "bbb"
    assert first_difference(lengths, lengths, ["a", "bbb"]) is None


def test_the_package_is_the_one_that_is_meant() -> None:
    assert gigatoken.__name__ == gigatoken_encoder.PACKAGE
