import json
import random
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from hvdlm.text import byte
from hvdlm.text.tokenizer import Tokenizer, from_library


def random_text(seed: int) -> str:
    source = random.Random(seed)
    points = [source.randrange(0x110000) >> source.randrange(16) for _ in range(400)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def spec() -> dict[str, Any]:
    return json.loads(byte.build([]).to_str())


def test_alphabet_is_that_of_the_library() -> None:
    assert sorted(byte.alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("seed", range(20))
def test_fast_path_equals_the_library_equals_the_bytes(seed: int) -> None:
    text = random_text(seed)
    library = tokenizers.Tokenizer.from_str(byte.build([]).to_str())
    [fast] = from_library(library).encode_batch([text])
    np.testing.assert_array_equal(fast, library.encode(text, add_special_tokens=False).ids)
    np.testing.assert_array_equal(fast, list(text.encode()))
    assert library.decode(fast.tolist()) == text


def test_every_byte_is_its_own_id() -> None:
    built = from_library(byte.build([]))
    assert built.vocab_size == byte.VOCAB_SIZE == 259
    assert built.eos_id == 256
    assert [built.decode([b]) for b in range(128)] == [chr(b) for b in range(128)]
    assert built.decode([0xE4, 0xB8]) == "\ufffd"
    assert built.decode([65, 256]) == "A<|endoftext|>"


def test_recognised_by_content_however_it_is_written() -> None:
    assert byte.is_byte(spec())
    pretty = json.dumps({key: spec()[key] for key in reversed(spec())}, indent=2)
    assert byte.is_byte(json.loads(tokenizers.Tokenizer.from_str(pretty).to_str(pretty=True)))


def test_the_fast_path_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = from_library(byte.build([]))
    monkeypatch.setattr(fast, "_library", None)
    assert fast.encode_batch(["ab"])[0].tolist() == [97, 98]


def changed(key: str, value: Any) -> dict[str, Any]:
    result = spec()
    *path, last = key.split(".")
    inner = result
    for part in path:
        inner = inner[part]
    inner[last] = value
    return result


@pytest.mark.parametrize(
    "other",
    [
        changed("normalizer", {"type": "Lowercase"}),
        changed("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}),
        changed("pre_tokenizer", None),
        changed("model.merges", [["a", "b"]]),
        changed("model.ignore_merges", True),
        changed("model.vocab", {**spec()["model"]["vocab"], "a": 98, "b": 97}),
        changed("model.vocab", {}),
        changed("model", None),
        changed("added_tokens", [{"id": 256, "content": "ab", "special": False}]),
        {},
    ],
)
def test_not_recognised_where_ids_are_not_the_bytes(other: dict[str, Any]) -> None:
    assert not byte.is_byte(other)


def test_a_tokenizer_that_lowercases_is_encoded_by_the_library() -> None:
    other = Tokenizer(json.dumps(changed("normalizer", {"type": "Lowercase"})).encode())
    assert other.encode_batch(["AbC"])[0].tolist() == list(b"abc")
