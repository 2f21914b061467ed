"""Tokenizer files that others made."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from hvdlm.config import UserError
from hvdlm.text.tokenizer import KNOWN_EOS, Tokenizer, from_library, load


def word_level(*specials: str, vocab: dict[str, int] | None = None) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.WordLevel(vocab or {"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(list(specials))
    return library


@pytest.mark.parametrize("eos", KNOWN_EOS)
def test_eos_is_found_by_its_usual_names(eos: str) -> None:
    assert from_library(word_level("<s>", eos)).eos_id == 4


def test_the_first_known_name_wins_and_eos_overrules() -> None:
    json_bytes = word_level("</s>", "<|endoftext|>").to_str().encode()
    assert Tokenizer(json_bytes).eos_id == 4
    assert Tokenizer(json_bytes, eos="</s>").eos_id == 3


def test_without_eos_the_candidates_are_named() -> None:
    tokenizer = from_library(word_level("[CLS]", "[SEP]"))
    assert tokenizer.encode_batch(["a b"])[0].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"--eos; its special tokens: \[CLS\], \[SEP\]"):
        _ = tokenizer.eos_id
    with pytest.raises(UserError, match=r"--eos <end>: .* no such token.*\[CLS\]"):
        Tokenizer(tokenizer.json_bytes, eos="<end>")


def test_truncation_padding_and_templates_are_ignored() -> None:
    library = word_level("<s>", "</s>")
    library.enable_truncation(2)
    library.enable_padding(length=8, pad_id=0)
    library.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    tokenizer = from_library(library)
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a b a b", "a"])] == [[1, 2, 1, 2], [1]]


def test_text_cannot_spell_a_special_token_that_is_a_word_of_the_model() -> None:
    tokenizer = from_library(word_level("<|endoftext|>", vocab={"<unk>": 0, "<|endoftext|>": 1, "a": 2}))
    assert tokenizer.eos_id == 1
    assert tokenizer.encode_batch(["a <|endoftext|> a"])[0].tolist() == [2, 0, 0, 2]


def test_text_cannot_spell_eos_that_is_an_ordinary_added_token() -> None:
    library = word_level()
    library.add_tokens([AddedToken("</s>", special=False), AddedToken("<br>", special=False)])
    tokenizer = from_library(library)
    assert tokenizer.eos_id == 3
    assert tokenizer.encode_batch(["a</s>b <br>"])[0].tolist() == [0, 0, 4]


def test_text_cannot_spell_eos_in_a_unigram_model() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</s>ab▁")]
    library = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Replace("▁", " ")
    library.add_special_tokens(["<unk>", "</s>"])
    library.encode_special_tokens = True
    assert 1 in library.encode("a</s>b", add_special_tokens=False).ids, "no longer a trap of the library"
    tokenizer = from_library(library)
    [ids, unknown] = tokenizer.encode_batch(["a</s>b </s></s>", "a?"])
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a</s>b </s></s>"
    assert unknown.tolist() == [6, 0]


def test_text_cannot_spell_a_special_token_by_what_is_normalized_to_it() -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "</>wespad")]
    library = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer = from_library(library)
    wide = "we see \uff1cpad\uff1e\uff1cpad\uff1e and \uff1c/s\uff1e <pad>"
    [ids, plain] = tokenizer.encode_batch([wide * 50, "we see"])
    assert not {0, 1} & set(ids.tolist())
    assert tokenizer.decode(ids).replace(" ", "") == ("wesee<pad><pad>a<unk>d</s><pad>" * 50).replace(" ", "")
    assert plain.tolist() == library.encode("we see", add_special_tokens=False).ids


def test_a_text_that_the_model_has_no_token_for_is_one_line() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "the": 1}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = from_library(library)
    assert tokenizer.encode_batch(["the the"])[0].tolist() == [1, 1]
    with pytest.raises(
        UserError, match=r"cannot encode a text: WordLevel error: .*; needed a tokenizer that"
    ):
        tokenizer.encode_batch(["the cat"])


def test_vocab_size_counts_the_largest_id() -> None:
    library = word_level("</s>", vocab={"<unk>": 0, "a": 70000})
    tokenizer = from_library(library)
    assert tokenizer.vocab_size == 70001
    assert tokenizer.encode_batch(["a"])[0].tolist() == [70000]
    assert tokenizer.encode_batch(["a"])[0].dtype == "uint32"
    assert from_library(word_level("</s>", vocab={"<unk>": 0, "a": 65535})).dtype == "uint16"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\x00",
        b'{"model": {"type": "None"}}',
        b'{"a": 1}' * 3,
        b"[" * 100_000,
    ],
    ids=lambda content: ascii(content[:12]),
)
def test_any_other_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: not a tokenizer.json")
    assert "\n" not in str(caught.value)


def test_no_tokens_no_file_and_a_folder(tmp_path: Path) -> None:
    empty = tokenizers.Tokenizer(models.BPE()).to_str().encode()
    with pytest.raises(UserError, match="without a single token"):
        Tokenizer(empty)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(word_level("</s>").to_str()), indent=3))
    loaded = load(tmp_path)
    assert loaded.eos_id == 3
    assert loaded.json_bytes == (tmp_path / "tokenizer.json").read_bytes()
