"""Weights to and from Hugging Face's LlamaForCausalLM, which is asked itself."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvdlm.config import ModelConfig, UserError
from hvdlm.config.parse import load_config
from hvdlm.models.llama import load_hf_, to_hf
from hvdlm.models.llama_config import config_from_hf
from hvdlm.models.transformer import Transformer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

VOCAB = 128
SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "rope_theta": 500.0}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def hf_model(folder, *, tied=False, dtype=torch.float32, max_shard_size="5GB", **changes):
    """A LlamaForCausalLM with weights large enough that a wrong one shows, saved by transformers."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=changes.pop("vocab_size", VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def build(*, tied=False, vocab_size=VOCAB, **changes):
    torch.manual_seed(2)
    return Transformer(ModelConfig(**SHAPE | {"tie_embeddings": tied} | changes), vocab_size).eval()


def tokens():
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_same_logits_as_transformers(tmp_path, tied, max_shard_size):
    theirs = hf_model(tmp_path, tied=tied, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")
    ours = build(tied=tied)
    load_hf_(ours, tmp_path)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_read_into_fp32(tmp_path, dtype):
    hf_model(tmp_path, dtype=dtype)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = build()
    load_hf_(ours, tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=0)


def test_smaller_vocabulary_fills_the_first_rows(tmp_path):
    theirs = hf_model(tmp_path, vocab_size=100)
    ours, fresh = build(), build()
    load_hf_(ours, tmp_path)
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(ours.state_dict()[name][100:], fresh.state_dict()[name][100:])
    ids = tokens() % 100
    torch.testing.assert_close(ours(ids)[..., :100], theirs(ids).logits, atol=1e-4, rtol=0)


def test_there_and_back(tmp_path):
    ours, again = build(), build(rope_theta=500.0)
    config, tensors = to_hf(ours, seq_len=64, eos_id=3, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.nn.init.zeros_(again.head.weight)
    load_hf_(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    assert config_from_hf(tmp_path) == SHAPE | {"tie_embeddings": False, "norm_eps": 1e-5}


def test_another_shape_names_the_flags_that_cure_it(tmp_path):
    hf_model(tmp_path)
    with pytest.raises(UserError, match=r"width 32 \(configured 128\)") as caught:
        load_hf_(Transformer(ModelConfig(layers=1, width=128, heads=2), VOCAB), tmp_path)
    flags = shlex.split(str(caught.value).partition("; add ")[2])
    assert set(flags[::2]) == {f"--model.{key}" for key in [*SHAPE, "tie_embeddings"]}
    config, _ = load_config(["--model.layers", "1", *flags], prog="test")
    load_hf_(Transformer(config.model, VOCAB), tmp_path)


def test_automatic_values_follow_the_flags(tmp_path):
    hf_model(tmp_path)
    # 8 heads have 8 kv_heads; with the flag --model.heads 4 they would be 4, the folder has 2.
    model = build(heads=8, kv_heads=0)
    with pytest.raises(UserError, match=r"add --model.heads 4 --model.kv_heads 2$"):
        load_hf_(model, tmp_path)
    model = build(heads=2, kv_heads=0)
    with pytest.raises(UserError, match=r"add --model.heads 4 --model.kv_heads 2$"):
        load_hf_(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn'"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "qwen3"}, "qwen3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"vocab_size": 200}, "tokenizer.json"),
        ({"vocab_size": None}, "vocabulary"),
    ],
)
def test_what_would_be_computed_differently_is_refused(tmp_path, change, named):
    hf_model(tmp_path)
    rewrite(tmp_path, **change)
    with pytest.raises(UserError) as caught:
        load_hf_(build(), tmp_path)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_missing_and_misshapen_tensors_are_refused(tmp_path):
    hf_model(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for tensors, message in (
        (whole | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, r"q_proj\.bias"),
        ({k: v for k, v in whole.items() if k != "model.norm.weight"}, r"missing.*model\.norm\.weight"),
        (whole | {"model.norm.weight": torch.zeros(31)}, r"model\.norm\.weight has shape \[31\]"),
        (whole | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "int8"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            load_hf_(build(), tmp_path)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, file)
    load_hf_(build(), tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_hf_(build(), tmp_path)
    hf_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="unreadable weights"):
        load_hf_(build(), tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_hf_(build(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*convert"):
        load_hf_(build(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        load_hf_(build(), tmp_path)


def test_index_cannot_leave_the_folder(tmp_path):
    hf_model(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    outside = json.loads(index.read_text())
    outside["weight_map"] = dict.fromkeys(outside["weight_map"], "../model.safetensors")
    index.write_text(json.dumps(outside))
    with pytest.raises(UserError, match="names no files"):
        load_hf_(build(), tmp_path / "model")


def test_export_in_bf16(tmp_path):
    _, tensors = to_hf(build(tied=True), seq_len=64, eos_id=3, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
