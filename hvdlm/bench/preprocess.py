"""Preprocessing beside the bare tokenizer and Hugging Face `encode_batch`, in one process on one core.

Text is the standard library's sources, in one task; tokenizers are the demo's BPE and one of 32,768
tokens, both trained on it. With the fast encoder installed everything is measured with it too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hvdlm.bench import versions
from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus import stdlib
from hvdlm.corpus.encode import encode_task
from hvdlm.corpus.job import TOKENIZER_NAME, Job
from hvdlm.corpus.plan import Piece, Task
from hvdlm.corpus.pool import one_thread
from hvdlm.text import bpe, fast, gigatoken_encoder
from hvdlm.text.tokenizer import Tokenizer, from_library

VOCAB_SIZES = (stdlib.VOCAB_SIZE, bpe.DEFAULT_VOCAB_SIZE)
_BATCH_CHARS = 1 << 18


@dataclass(frozen=True)
class _Way:
    """One way to encode everything."""

    name: str
    run: Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench preprocess`."""
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each of every way (default: 7)")
    parser.add_argument("--mb", type=float, default=4.0, help="MB of text (default: 4)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every way in turn, round after round.

    Returns:
        `text_mb`; `versions`; and for each tokenizer `encoder` (of the choice), the median `mb_per_s` of each
        way, and the median over rounds of `end_to_end` / bare, and of each way / `hugging_face`.

    Raises:
        UserError: the fast encoder was chosen and gave other ids on the whole text.
    """
    task = _task(int(args.mb * 1e6))
    texts = [Path(piece.path).read_bytes().decode() for piece in task.pieces]
    text_mb = task.size_bytes / 1e6
    results = []
    for vocab_size in VOCAB_SIZES:
        reference = from_library(bpe.build(texts, vocab_size))
        with tempfile.TemporaryDirectory() as folder, one_thread():
            choice = fast.check(reference, texts)
            ways = _ways(task, texts, reference, choice, Path(folder))
            rounds = [{way.name: _seconds(way) for way in ways} for _ in range(args.rounds + 1)][1:]
        results.append({"vocab_size": vocab_size, **choice, **_summary(rounds, text_mb)})
    return {
        "text_mb": text_mb,
        "rounds": args.rounds,
        "tokenizers": results,
        "versions": versions.installed(("tokenizers", gigatoken_encoder.PACKAGE, "numpy")),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['text_mb']:.1f} MB of text, one core, medians of {result['rounds']} rounds"]
    for one in result["tokenizers"]:
        lines.append(f"BPE of {one['vocab_size']:,} tokens; {fast.line(one) or one['encoder']}")
        for name, mb_per_s in one["mb_per_s"].items():
            ratios = [f"{one['times_hugging_face'][name]:.2f} x Hugging Face encode_batch"]
            if name in one["times_bare"]:
                ratios.append(f"{one['times_bare'][name]:.2f} of the bare tokenizer")
            lines.append(f"  {name:<18} {mb_per_s:8.2f} MB/s   {', '.join(ratios)}")
    return "\n".join([*lines, versions.line(result["versions"])])


def _task(size_bytes: int) -> Task:
    """Every n-th source file, so many that they have about this size."""
    files = stdlib.find()
    step = max(round(sum(file.size_bytes for file in files) / size_bytes), 1)
    pieces = [Piece(file.path, file.kind, 0, file.size_bytes, file.size_bytes) for file in files[::step]]
    return Task(0, "", tuple(pieces))


def _ways(
    task: Task, texts: Sequence[str], reference: Tokenizer, choice: fast.Choice, folder: Path
) -> list[_Way]:
    library = tokenizers.Tokenizer.from_buffer(reference.json_bytes)
    library.encode_special_tokens = True
    batches = list(_batches(texts))
    ways = [
        _Way("hugging_face", lambda: [library.encode_batch(b, add_special_tokens=False) for b in batches]),
        _Way("bare", lambda: [library.encode_batch_fast(b, add_special_tokens=False) for b in batches]),
        _Way("end_to_end", _end_to_end(task, reference, fast.REFERENCE, folder / "reference")),
    ]
    if choice["encoder"] != "reference":
        chosen = fast.follow(reference, choice)
        pairs = zip(reference.encode_batch(texts), chosen.encode_batch(texts), strict=True)
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise UserError(f"bench preprocess: {choice['encoder']} gives other ids", EXIT_CRASH)
        ways.append(_Way("fast_bare", lambda: [chosen.encode_batch(b) for b in batches]))
        ways.append(_Way("fast_end_to_end", _end_to_end(task, reference, choice, folder / "fast")))
    return ways


def _end_to_end(task: Task, tokenizer: Tokenizer, choice: fast.Choice, folder: Path) -> Callable[[], object]:
    folder.mkdir()
    job = Job(folder)
    job.write_plan([task])
    (folder / TOKENIZER_NAME).write_bytes(tokenizer.json_bytes)
    job.write_choice(choice)
    return lambda: encode_task(0, job, lambda _: None)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= _BATCH_CHARS:
            yield batch
            batch = []
    yield batch


def _seconds(way: _Way) -> float:
    begin = time.perf_counter()
    way.run()
    return time.perf_counter() - begin


def _summary(rounds: Sequence[dict[str, float]], text_mb: float) -> dict[str, Any]:
    """Medians; ratios are of neighbors in one round."""

    def times(name: str, other: str) -> float:
        return statistics.median(one[other] / one[name] for one in rounds)

    names = list(rounds[0])
    return {
        "mb_per_s": {name: statistics.median(text_mb / one[name] for one in rounds) for name in names},
        "times_bare": {
            name: times(name, name.replace("end_to_end", "bare")) for name in names if "end_to_end" in name
        },
        "times_hugging_face": {name: times(name, "hugging_face") for name in names},
    }
