"""What ``python -m hvdlm.preprocess`` says when a data set is there."""

from __future__ import annotations

import shlex

from hvdlm.corpus.build import Built
from hvdlm.corpus.options import Options
from hvdlm.data.manifest import Manifest
from hvdlm.preprocess.arguments import DEMO_OUT


def summary(options: Options, built: Built, seconds: float) -> str:
    """Counts, sizes and the next command.

    Args:
        options: what was asked for.
        built: what there is.
        seconds: how long it took.
    """
    manifest = built.manifest
    train, val = manifest.split("train"), manifest.split("val")
    tokens = manifest.tokens("train") + manifest.tokens("val")
    text_bytes = manifest.text_bytes("train") + manifest.text_bytes("val")
    lines = {
        "documents": f"{manifest.documents('train'):,} train, {manifest.documents('val'):,} val"
        f"{_left_out(built.stats.get('left_out', {}))}",
        "tokens": f"{manifest.tokens('train'):,} train, {manifest.tokens('val'):,} val; "
        f"{text_bytes / tokens:.2f} bytes of text a token",
        "tokenizer": f"{options.tokenizer}, {manifest.tokenizer.vocab_size:,} tokens",
        "shards": f"{len(train)} train, {len(val)} val; "
        f"{sum(shard.file_bytes for shard in manifest.shards) / 1e6:,.1f} MB",
    }
    if built.made:
        lines["time"] = f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB of text a second"
    lines["folder"] = str(options.out)
    lines["next"] = _next_command(options, manifest)
    head = (
        []
        if built.made
        else [f"{options.out} is already there, made from the same inputs with the same options"]
    )
    return "\n".join([*head, *(f"{name:<10} {text}" for name, text in lines.items())])


def _left_out(counts: dict[str, int]) -> str:
    reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items() if count]
    return f" (left out: {', '.join(reasons)})" if reasons else ""


def _next_command(options: Options, manifest: Manifest) -> str:
    data = "" if options.out == DEMO_OUT else f" --data.path {shlex.quote(str(options.out))}"
    return f"horovodrun -np 2 python -m hvdlm.train{data}"
