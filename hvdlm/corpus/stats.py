"""What became of the documents, and how long it took: for people, stats.json and seconds.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.corpus.piles import Pile
from hvdlm.data.files import publishing, write_atomic

FILE_NAME = "stats.json"
SECONDS_NAME = "seconds.json"
"""Apart, because it is the one file of a data set that is another every time."""
PLOT_NAME = "lengths.png"
_BINS = 32


def summary(pile: Pile) -> dict[str, Any]:
    """Documents, tokens, bytes of text, and the lengths in tokens.

    `lengths` has 32 numbers: how many documents have 2^k to 2^(k+1) - 1 tokens, eos included.
    """
    exponents = np.frexp(pile.lengths.astype(np.float64))[1] - 1
    return {
        "documents": len(pile.lengths),
        "tokens": int(pile.lengths.sum(dtype=np.int64)),
        "text_bytes": int(pile.text_bytes.sum(dtype=np.int64)),
        "lengths": np.bincount(exponents, minlength=_BINS).tolist(),
    }


def total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up equal objects of numbers, lists of numbers and such objects."""
    result: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(value, dict):
            result[key] = total(values)
        elif isinstance(value, list):
            result[key] = np.sum(values, axis=0).tolist()
        else:
            result[key] = sum(values)
    return result


def write(folder: Path, encoded: Sequence[dict[str, Any]], making: dict[str, Any]) -> None:
    """Write stats.json and seconds.json, and a plot of the lengths where matplotlib is installed.

    Args:
        folder: of the data set.
        encoded: results of the encode stage.
        making: what is another every time: which start made it, by which encoder, and the seconds of
            work in each stage, summed over its tasks.

    Raises:
        UserError: the disk is full.
    """
    counts = total([{"left_out": one["counts"], "splits": one["splits"]} for one in encoded])
    splits = counts["splits"]
    for split in splits.values():
        split["bytes_per_token"] = split["text_bytes"] / split["tokens"] if split["tokens"] else 0.0
    for name, content in (
        (FILE_NAME, {"splits": splits, "left_out": counts["left_out"]}),
        (SECONDS_NAME, making),
    ):
        write_atomic(folder / name, (json.dumps(content, indent=1) + "\n").encode())
    _plot(folder / PLOT_NAME, splits)


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote; empty where there is none."""
    return _read(folder / FILE_NAME)


def read_making(folder: Path) -> dict[str, Any]:
    """The `making` that `write` wrote; empty where there is none."""
    return _read(folder / SECONDS_NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _plot(path: Path, splits: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    used = [k for k in range(_BINS) if any(split["lengths"][k] for split in splits.values())]
    first, last = min(used, default=0), max(used, default=0)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="length of a document in tokens, eos included", ylabel="documents")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.4)
    width = 0.9 / len(splits)
    for i, (name, split) in enumerate(splits.items()):
        # Between the ticks, which are the bounds of a bin.
        left = [k + 0.05 + i * width for k in range(first, last + 1)]
        label = f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens"
        axes.bar(left, split["lengths"][first : last + 1], width, align="edge", label=label)
    ticks = range(first, last + 2, 1 + (last - first) // 16)
    axes.set_xticks(list(ticks), [_binary(k) for k in ticks])
    # A single document is to be seen beside millions.
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5, top=max(2.0, 2.0 * max(max(split["lengths"]) for split in splits.values())))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper center", frameon=False)
    with publishing(path) as temp:
        # A date in the file would make it another one every time.
        figure.savefig(temp, format="png", dpi=120, metadata={"Software": None})


def _binary(exponent: int) -> str:
    """2^exponent for an axis: 512, 1Ki, 64Mi."""
    tens, rest = divmod(exponent, 10)
    return f"{2**rest}{('', 'Ki', 'Mi', 'Gi')[tens]}"
