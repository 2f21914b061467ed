"""sentencepiece models as tokenizer.json: equal ids, or a refusal."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from hvdlm.config import UserError
from hvdlm.text import from_sentencepiece
from hvdlm.text.proof import HARD, probes
from hvdlm.text.tokenizer import Tokenizer, from_library

WORDS = "the cat sat on mat and saw a rat under blue stone roof while rain fell softly 12 times".split()
SENTENCES = [" ".join(WORDS[i % 7 :: 1 + i % 3]) + " \u4e2d\u6587 \u00e9" for i in range(60)]


def model(path: Path, kind: str, **options: Any) -> Path:
    """Train a tiny model; "identity" keeps text as it is."""
    settings = {"normalization_rule_name": "identity", "vocab_size": 320, "byte_fallback": True, **options}
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=content,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(content.getvalue())
    return path


def assert_equal(path: Path) -> Tokenizer:
    built = from_library(from_sentencepiece.build(path))
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [
        *HARD,
        *SENTENCES,
        "the  cat ",
        " the cat",
        "  \n ",
        "unseen words: zebra \U0001f469\u200d\U0001f469",
    ]
    for text, ids in zip(texts, built.encode_batch(texts), strict=True):
        assert ids.tolist() == original.encode(text), ascii(text)
        if original.unk_id() not in ids:
            assert built.decode(ids) == original.decode(ids.tolist()), ascii(text)
    assert built.eos_id == original.eos_id()
    assert built.vocab_size == original.vocab_size()
    return built


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": False},
        {"byte_fallback": False, "vocab_size": 90},
        {"add_dummy_prefix": False, "split_by_whitespace": False},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_ids_and_text_are_those_of_sentencepiece(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(model(tmp_path / "m.model", kind, **options))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_spells_neither_control_pieces_nor_bytes(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.model", kind)
    built = from_library(from_sentencepiece.build(path))
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("a</s>b </s>", "<s><unk>", "<0x0A> <0x41>"):
        [ids] = built.encode_batch([text])
        assert ids.tolist() == original.encode(text)
        assert not np.isin(ids, [1, 2]).any()


def test_the_cut_in_a_name_spares_the_pieces_before_it(tmp_path: Path) -> None:
    path = model(tmp_path / "m.model", "unigram")
    spec: Any = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(path.read_bytes())
    spec.pieces.add(piece="\u2581<", score=-0.5)
    path.write_bytes(spec.SerializeToString())
    built = assert_equal(path)
    assert built.encode_batch(["<s>"])[0][0] == len(spec.pieces) - 1


def test_a_charsmap_is_taken_over(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("9\t20\nA\t20\n")
    options = {"normalization_rule_tsv": str(rules), "normalization_rule_name": "", "byte_fallback": False}
    built = assert_equal(model(tmp_path / "m.model", "bpe", vocab_size=90, **options))
    ids = [found.tolist() for found in built.encode_batch(["the cat sat", "the\tcat\n sat"])]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("bpe", {"normalization_rule_name": "nmt_nfkc"}, "with the same ids .* differ for '"),
        ("unigram", {"normalization_rule_name": "nfkc_cf"}, "with the same ids .* differ for '"),
        ("bpe", {"user_defined_symbols": ["<sep>"]}, "user-defined or unused pieces"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "white space as a suffix"),
        ("char", {"byte_fallback": False}, "neither of type unigram nor bpe"),
    ],
)
def test_what_cannot_be_equal_is_refused(
    kind: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = model(tmp_path / "m.model", kind, **options)
    with pytest.raises(UserError, match=reason) as caught:
        from_sentencepiece.build(path)
    assert str(caught.value).startswith(f"{path}: cannot be made a tokenizer.json")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    with pytest.raises(UserError, match="cannot read this tokenizer"):
        from_sentencepiece.build(path)
    for content in (b"", b"\xff" * 40, b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a sentencepiece model") as caught:
            from_sentencepiece.build(path)
        assert "\n" not in str(caught.value)


def test_probes_are_the_same_each_time_and_hold_every_name() -> None:
    texts = list(probes(["<tool>"]))
    assert texts == list(probes(["<tool>"]))
    assert any("b<tool> <tool>" in text for text in texts)
    assert 500_000 < sum(map(len, texts)) < 5_000_000
