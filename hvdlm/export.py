"""Command: write a trained model as a folder that other programs load.

python -m hvdlm.export RUN --out DIR --format hf
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hvdlm.config import EXIT_CRASH, EXIT_DONE, UserError, run_command
from hvdlm.data.files import fsync
from hvdlm.models.llama import to_hf
from hvdlm.models.transformer import Transformer
from hvdlm.run.restore import open_checkpoint
from hvdlm.run.trained import Trained, open_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_hf(trained: Trained, out: Path, *, dtype: torch.dtype) -> None:
    """Write a model as LlamaForCausalLM, with its tokenizer.

    The folder appears when its last file is written, under a temporary name beside it before.

    Args:
        trained: the model.
        out: a folder that is not there yet, or empty.
        dtype: of the weights.

    Raises:
        UserError: the model is of another kind, the folder has content, or it cannot be written.
    """
    if not isinstance(trained.model, Transformer):
        raise UserError(f"--format hf: writes model.kind transformer, this is {trained.kind}")
    check_free(out)
    seq_len = trained.data.seq_len
    config, tensors = to_hf(trained.model, seq_len=seq_len, eos_id=trained.eos_id, dtype=dtype)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    documents = {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer_config(trained.tokenizer.json_bytes, trained.eos_id, seq_len),
    }
    out = out.absolute()
    temp = out.with_name(f".tmp-{secrets.token_hex(6)}-{out.name}")
    try:
        temp.mkdir(parents=True)
        # transformers before version 5 refuses a file that does not name its framework.
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
        (temp / "tokenizer.json").write_bytes(trained.tokenizer.json_bytes)
        for name, content in documents.items():
            (temp / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # safetensors creates its files for their owner alone, whatever the umask.
        (temp / "model.safetensors").chmod((temp / "config.json").stat().st_mode)
        for path in (*temp.iterdir(), temp):
            fsync(path)
        temp.rename(out)
        fsync(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}; nothing is left there", EXIT_CRASH) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def tokenizer_config(json_bytes: bytes, eos_id: int, seq_len: int) -> dict[str, Any]:
    """The tokenizer_config.json that makes AutoTokenizer read `tokenizer.json` as it is.

    Args:
        json_bytes: the tokenizer.json.
        eos_id: id that ends a document; also what a text begins after.
        seq_len: tokens in a training sequence.
    """
    spec = json.loads(json_bytes)
    added = {token["id"]: token["content"] for token in spec.get("added_tokens") or []}
    vocabulary = spec["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        names = {id: token for token, id in vocabulary.items()} | added
    else:  # a Unigram model has pairs of token and score, in order of ids
        names = {id: token for id, (token, _) in enumerate(vocabulary)} | added
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[eos_id],
        "eos_token": names[eos_id],
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    optional = {
        "unk_token": spec["model"].get("unk_token"),
        "pad_token": next((name for name in added.values() if name.strip("<|[]>").lower() == "pad"), None),
    }
    return config | {key: name for key, name in optional.items() if name}


def check_free(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: `out` is a file, or a folder with content.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is not a folder; name one that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; name another folder, or delete this one first")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        UserError: bad arguments, no valid run, or a folder that cannot be written.
    """
    args = _parser().parse_args(argv)
    check_free(Path(args.out))
    trained = open_trained(open_checkpoint(Path(args.run)))
    export_hf(trained, Path(args.out), dtype=DTYPES[args.dtype])
    step = trained.checkpoint.state["step"]
    print(f"exported step {step} of {args.run} to {args.out} (LlamaForCausalLM, {args.dtype})")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.export",
        description="Write a trained model as a folder that other programs load.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", nargs="?", default="data/runs/demo", help="run or checkpoint folder")
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, help="folder to write; must be new or empty"
    )
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: transformers' LlamaForCausalLM")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="precision of the weights")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("export", main))
