"""Weights to and from Hugging Face's LlamaForCausalLM.

The transformer uses the same layout (rotary pairs (i, i + K/2)), so tensors are renamed, never permuted.
Only safetensors files are read: a pickle can run code.

Source: `transformers`, models/llama: modeling_llama.py (names).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hvdlm.config import ModelConfig, UserError
from hvdlm.models.llama_config import check_same_model, read_json
from hvdlm.models.transformer import INIT_STD, Transformer, mlp_width

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each id of the vocabulary."""


def to_hf(
    model: Transformer, *, seq_len: int, eos_id: int, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model as LlamaForCausalLM has it.

    Args:
        model: on any device.
        seq_len: tokens in a training sequence.
        eos_id: id that ends a document; documents also start after it, so it is bos as well.
        dtype: of the tensors.

    Returns:
        The content of config.json, and tensors by their Hugging Face names (on the CPU; a tied
        output projection is left out).
    """
    config = model.config
    state = model.state_dict()
    tensors = {theirs: state[ours].to("cpu", dtype).contiguous() for ours, theirs in hf_names(config).items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp_width(config),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": INIT_STD,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }, tensors


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Every parameter's name here -> its name in LlamaForCausalLM."""
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for layer in range(config.layers):
        for ours, theirs in _LAYER_NAMES.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    names["norm.weight"] = "model.norm.weight"
    return names if config.tie_embeddings else names | {"head.weight": "lm_head.weight"}


@torch.no_grad()
def load_hf_(model: nn.Module, folder: Path) -> None:
    """Fill a model with the weights of a Hugging Face Llama folder, whatever their precision.

    A vocabulary smaller than the model's fills the first rows; the others keep their initialisation.

    Args:
        model: on any device; its config must describe the folder's model.
        folder: holds config.json and model.safetensors, or its shards and their index.

    Raises:
        UserError: no such model in the folder, one that is not a plain Llama, one of another shape (the
            message lists the flags to add), or a damaged file.
    """
    if not isinstance(model, Transformer):
        raise UserError(f"model.init {folder}: a Llama model needs --model.kind transformer")
    check_same_model(model.config, model.vocab_size, folder)
    names = hf_names(model.config)
    with ExitStack() as stack:
        try:
            tensors = _open_tensors(folder, stack)
            _check_names(set(names.values()), set(tensors), folder)
            state = model.state_dict()
            for ours, theirs in names.items():
                _copy_(state[ours], tensors[theirs].get_tensor(theirs), name=theirs, folder=folder)
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.init {folder}: unreadable weights: {error}; copy them again") from error


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file that holds each tensor."""
    if (folder / "model.safetensors.index.json").exists():
        weight_map = read_json(folder, "model.safetensors.index.json").get("weight_map")
        files = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not files or any(Path(str(file)).name != file for file in files):
            raise UserError(
                f"model.init {folder}: its model.safetensors.index.json names no files; copy it again"
            )
    else:
        files = ["model.safetensors"]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        cure = (
            f"{pickles[0]} is a pickle, which can run code and is not read: convert it with transformers' "
            "save_pretrained(DIR, safe_serialization=True)"
            if pickles
            else "copy it there"
        )
        raise UserError(f"model.init {folder}: no {missing[0]}; {cure}")
    opened = [stack.enter_context(safe_open(folder / file, framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check_names(needed: set[str], found: set[str], folder: Path) -> None:
    lacking = sorted(needed - found)
    # A tied model may store its output projection again, an old one its rotary frequencies.
    extra = {name for name in found - needed if not name.endswith("rotary_emb.inv_freq")} - {"lm_head.weight"}
    if lacking:
        raise UserError(f"model.init {folder}: {len(lacking)} tensors are missing, the first is {lacking[0]}")
    if extra:
        raise UserError(
            f"model.init {folder}: {len(extra)} tensors are not of a plain Llama, the first is {min(extra)}"
        )


def _copy_(weight: Tensor, values: Tensor, *, name: str, folder: Path) -> None:
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"model.init {folder}: {name} has dtype {values.dtype}; needed fp32, bf16 or fp16")
    rows = min(values.shape[0], weight.shape[0]) if name in _VOCABULARY and values.dim() else weight.shape[0]
    if values.shape != (rows, *weight.shape[1:]):
        raise UserError(
            f"model.init {folder}: {name} has shape {list(values.shape)}, by config.json it has "
            f"{list(weight.shape)}; copy the model again"
        )
    weight[:rows].copy_(values)
