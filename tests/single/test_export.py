"""Exported folders, read by transformers itself."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from trained_run import in_memory, trained_once

from hvdlm import export
from hvdlm.config import UserError
from hvdlm.models.llama import load_hf_
from hvdlm.models.llama_config import config_from_hf
from hvdlm.models.transformer import Transformer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

TEXT = "def naïve(x):\r\n    return '自由 👩‍👩‍👧‍👦' # <|endoftext|>\n"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tokens():
    return torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [0, 2, 1])
def test_transformers_computes_the_same_logits(tmp_path, tied, kv_heads):
    trained = in_memory("byte", tie_embeddings=tied, kv_heads=kv_heads, rope_theta=777.0, norm_eps=3e-5)
    export.export_hf(trained, tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    ours = trained.model(tokens())
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs(tokens()).logits, ours, atol=1e-4, rtol=0)


def test_transformers_continues_as_generate_does(tmp_path):
    trained = in_memory("byte", seq_len=64)
    export.export_hf(trained, tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = theirs.generate(tokens()[:1], max_new_tokens=20, do_sample=False, pad_token_id=0)
    seen = tokens()[:1]
    while seen.shape[1] < found.shape[1]:
        seen = torch.cat((seen, trained.model(seen)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, seen)
    assert theirs.generation_config.eos_token_id == trained.eos_id


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_can_be_trained_on(tmp_path, tied):
    trained = in_memory("bpe", tie_embeddings=tied, norm_eps=3e-5)
    export.export_hf(trained, tmp_path / "out", dtype=torch.float32)
    again = Transformer(trained.model.config, trained.model.vocab_size).eval()
    load_hf_(again, tmp_path / "out")
    assert torch.equal(again(tokens()), trained.model(tokens()))
    assert config_from_hf(tmp_path / "out")["norm_eps"] == 3e-5


@pytest.mark.parametrize("kind", ["byte", "bpe", "word", "fallback"])
def test_auto_tokenizer_is_the_same_tokenizer(tmp_path, kind):
    trained = in_memory(kind, seq_len=48)
    export.export_hf(trained, tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # transformers takes a spelt special token for the token, hvdlm for text.
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs(text).input_ids == trained.tokenizer.encode_batch([text])[0].tolist()
    assert theirs.decode(theirs(text).input_ids) == trained.tokenizer.decode(theirs(text).input_ids)
    assert theirs.eos_token_id == theirs.bos_token_id == trained.eos_id
    assert theirs.model_max_length == 48
    pad, unknown = {"byte": ("<|pad|>", None), "bpe": (None, None)}.get(kind, (None, "<unk>"))
    if kind == "word":
        pad, unknown = "<PAD>", "<UNK>"
    assert (theirs.pad_token, theirs.unk_token) == (pad, unknown)


def test_bf16_is_half_the_size_and_near(tmp_path):
    trained = in_memory("byte")
    for name, dtype in export.DTYPES.items():
        export.export_hf(trained, tmp_path / name, dtype=dtype)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in export.DTYPES}
    assert 0.45 < sizes["bf16"] / sizes["fp32"] < 0.6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert theirs.dtype == torch.bfloat16
    # transformers before version 5 refuses a file that does not say this.
    with safe_open(tmp_path / "bf16" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours = trained.model(tokens()).argmax(-1)
    assert (theirs(tokens()).logits.argmax(-1) == ours).float().mean() > 0.9


def test_files_are_for_everyone_the_umask_allows(tmp_path):
    export.export_hf(in_memory("byte"), tmp_path / "new" / "out", dtype=torch.float32)
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "out").iterdir()}
    assert modes == {0o666 & ~mask}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    export.export_hf(in_memory("byte"), tmp_path / "out", dtype=torch.float32)
    before = (tmp_path / "out" / "config.json").read_bytes()
    (tmp_path / "file").touch()
    for name, message in (("out", "not empty"), ("file", "not a folder"), ("file/x", "cannot be written")):
        with pytest.raises(UserError, match=message):
            export.export_hf(in_memory("bpe"), tmp_path / name, dtype=torch.float32)
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        export.export_hf(in_memory("byte"), tmp_path / "out", dtype=torch.float32)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, tiny_data, tmp_path_factory, capsys):
    run = trained_once(tmp_path_factory, tiny_data)
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--dtype", "bf16"]) == 0
    assert f"exported step 2 of {run} to {out}" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 32
    with pytest.raises(UserError, match="is not empty"):
        export.main([str(run), "--out", str(out)])
    with pytest.raises(UserError, match="no such run folder"):
        export.main(["nowhere", "--out", str(tmp_path / "other")])
