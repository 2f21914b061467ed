"""What a Hugging Face folder's config.json says, and whether hvdlm computes the same.

Source: `transformers`, models/llama/configuration_llama.py (names and defaults).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hvdlm.config import ModelConfig, UserError
from hvdlm.models.transformer import mlp_width

_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
"""Fields of config.json that change the arithmetic, with the values that hvdlm computes."""


def config_from_hf(folder: Path) -> dict[str, Any]:
    """The values of the model section that describe a Hugging Face Llama folder.

    Raises:
        UserError: no config.json, or not a plain Llama.
    """
    return _model_values(read_json(folder, "config.json"), folder)


def check_same_model(config: ModelConfig, vocab_size: int, folder: Path) -> None:
    """Check that a folder's model is the configured one.

    Args:
        config: the model section.
        vocab_size: rows of the embedding, padding included.
        folder: holds config.json.

    Raises:
        UserError: not a plain Llama, another shape (the message lists the flags to add), or more tokens.
    """
    hf = read_json(folder, "config.json")
    _check_same_shape(config, _model_values(hf, folder), folder)
    _check_vocabulary(hf.get("vocab_size"), vocab_size, folder)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        folder: the model's folder.
        name: the file in it.

    Raises:
        UserError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.init {folder}: no {name} there; needed a folder with a Hugging Face Llama model"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.init {folder}: {name} is no JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"model.init {folder}: {name} is not a JSON object; copy it again")
    return content


def _model_values(hf: dict[str, Any], folder: Path) -> dict[str, Any]:
    _check_plain_llama(hf, folder)
    heads = _number(hf, "num_attention_heads", folder)
    rope = hf if hf.get("rope_parameters") is None else hf["rope_parameters"]
    values = {
        "layers": int(_number(hf, "num_hidden_layers", folder)),
        "width": int(_number(hf, "hidden_size", folder)),
        "heads": int(heads),
        "kv_heads": int(_number(hf, "num_key_value_heads", folder, default=heads)),
        "mlp_width": int(_number(hf, "intermediate_size", folder)),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "rope_theta": float(_number(rope, "rope_theta", folder, default=10000.0)),
        "norm_eps": float(_number(hf, "rms_norm_eps", folder, default=1e-6)),
    }
    if hf.get("head_dim") not in (None, values["width"] // values["heads"]):
        raise UserError(
            f"model.init {folder}: head_dim {hf['head_dim']} in config.json is not hidden_size / "
            "num_attention_heads, which hvdlm needs; choose another model"
        )
    return values


def _number(hf: dict[str, Any], field: str, folder: Path, *, default: float | None = None) -> float:
    """A positive number of config.json; `default` is what transformers takes where it is missing or null."""
    found = hf.get(field)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise UserError(f"model.init {folder}: {field} {found!r} in config.json; needed a positive number")
    return found


def _check_plain_llama(hf: dict[str, Any], folder: Path) -> None:
    """Refuse whatever this transformer would compute differently."""
    architectures = hf.get("architectures") or [hf.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["llama"]):
        raise UserError(
            f"model.init {folder}: architectures {architectures} in config.json; needed ['LlamaForCausalLM']"
        )
    for field, plain in _PLAIN_VALUES.items():
        if hf.get(field) not in plain:
            raise UserError(
                f"model.init {folder}: {field} {json.dumps(hf[field])} in config.json is not supported; "
                f"needed {json.dumps(plain[0])}"
            )
    for field in ("rope_scaling", "rope_parameters"):
        rope = hf.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise UserError(
                f"model.init {folder}: {field} of type {kind!r} in config.json is not supported; "
                "needed plain rotary positions (null)"
            )


def _check_same_shape(config: ModelConfig, needed: dict[str, Any], folder: Path) -> None:
    """Refuse a model of another shape with the flags that make it the same."""
    flags: dict[str, Any] = {}
    for _ in range(2):  # a changed width or heads also changes what the automatic values come to
        found = _resolved(dataclasses.replace(config, **flags))
        flags |= {key: value for key, value in needed.items() if found[key] != value}
    if flags:
        found = _resolved(config)
        differences = ", ".join(f"{key} {value} (configured {found[key]})" for key, value in flags.items())
        arguments = " ".join(f"--model.{key} {json.dumps(value)}" for key, value in flags.items())
        raise UserError(f"model.init {folder}: that model has {differences}; add {arguments}")


def _resolved(config: ModelConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {
        "kv_heads": config.kv_heads or config.heads,
        "mlp_width": mlp_width(config),
    }


def _check_vocabulary(found: Any, rows: int, folder: Path) -> None:
    if not isinstance(found, int) or found > rows:
        raise UserError(
            f"model.init {folder}: its vocabulary has {found} tokens, the data's {rows} (padded): it has "
            f"another tokenizer; preprocess the corpus with --tokenizer {folder / 'tokenizer.json'}"
        )
