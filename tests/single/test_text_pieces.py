import re

import pytest

from hvdlm.text import bpe, pieces
from hvdlm.text.tokenizer import from_library

LIMIT = pieces.PIECE_CHARS


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("", [0]),
        ("x" * LIMIT, [LIMIT]),
        ("x" * (2 * LIMIT + 1), [LIMIT, LIMIT, 1]),
        ("ab\r\n" + "x" * LIMIT, [4, LIMIT]),
        ("ab cd" + "x" * LIMIT, [2, LIMIT, 3]),
        ("\n" * (LIMIT + 5), [LIMIT, 5]),
        (" " * (LIMIT + 5), [LIMIT - 1, 6]),
    ],
    ids=["empty", "exact", "solid", "newline", "space", "newlines", "spaces"],
)
def test_cut_follows_the_documented_rule(text: str, lengths: list[int]) -> None:
    parts = list(pieces.cut(text))
    assert "".join(parts) == text
    assert [len(part) for part in parts] == lengths


@pytest.mark.parametrize("run", ["y", " ", "中", "a.", "\n\t"])
def test_cut_runs_bounds_every_word(run: str) -> None:
    text = f"some words {run * 2000}, more words\n"
    parts = list(pieces.cut_runs([text, "short"]))
    assert "".join(parts) == text + "short"
    words = [word for part in parts for word in re.findall(r"\S+|\s+", part)]
    assert max(map(len, words)) == pieces.RUN_CHARS
    assert len(parts) < 24


def test_cut_runs_leaves_ordinary_text_alone() -> None:
    text = "word " * 1000 + "x" * pieces.RUN_CHARS + "\n" * pieces.RUN_CHARS
    assert list(pieces.cut_runs([text])) == [text]


def test_a_bpe_learns_from_a_million_equal_letters_in_no_time() -> None:
    library = bpe.build(["y" * 1_000_000, " " * 1_000_000], 300)
    assert "y" * 64 in library.get_vocab()


def test_cut_inside_leaves_no_match() -> None:
    pattern = re.compile("aba|<x>")
    parts = pieces.cut_inside("ababa <x><x>", pattern)
    assert "".join(parts) == "ababa <x><x>"
    assert not any(pattern.search(part) for part in parts)


def test_a_long_text_survives_and_is_encoded_by_pieces() -> None:
    tokenizer = from_library(bpe.build(["some words in a row\n"], 300))
    text = "some words 中文\n" * (LIMIT // 12)
    assert len(text) > LIMIT
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    by_hand = [id for part in pieces.cut(text) for id in tokenizer.encode_batch([part])[0].tolist()]
    assert ids.tolist() == by_hand
