"""Preprocessing by several ranks beside one, under mpirun, from start to end.

Text is the standard library's sources as JSON lines, over and over; the tokenizer is given, and encodes by
the reference, so that encoding and not starting is what takes the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus import stdlib
from hvdlm.data.manifest import FILE_NAME
from hvdlm.text import bpe
from hvdlm.text.tokenizer import from_library

_VOCAB_SIZE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench scaling`."""
    parser.add_argument("--ranks", type=int, default=2, help="ranks beside one (default: 2)")
    parser.add_argument("--mb", type=float, default=180.0, help="MB of text (default: 180)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with one rank and with more")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command in turn with one rank and with several.

    Returns:
        `text_mb`; `ranks`; `seconds`: medians by number of ranks; `times`: the median over rounds of how many
        times as fast the several ranks were.

    Raises:
        UserError: a run failed, or made another data set.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-bench-") as name:
        folder = Path(name)
        text_mb = _write_corpus(folder, args.mb) / 1e6
        rounds = [{n: _seconds(folder, n) for n in (1, args.ranks)} for _ in range(args.rounds)]
        if len({(folder / f"{n}" / FILE_NAME).read_bytes() for n in (1, args.ranks)}) > 1:
            raise UserError("bench scaling: the numbers of ranks gave different data sets", EXIT_CRASH)
    return {
        "text_mb": text_mb,
        "ranks": args.ranks,
        "seconds": {n: statistics.median(one[n] for one in rounds) for n in (1, args.ranks)},
        "times": statistics.median(one[1] / one[args.ranks] for one in rounds),
        "rounds": args.rounds,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['text_mb']:.0f} MB of text, medians of {result['rounds']} rounds, start-up included"]
    for ranks, seconds in result["seconds"].items():
        lines.append(f"{ranks} rank(s) {seconds:8.1f} s {result['text_mb'] / seconds:8.2f} MB/s")
    return "\n".join([*lines, f"{result['ranks']} ranks are {result['times']:.2f} times as fast as one"])


def _write_corpus(folder: Path, mb: float) -> int:
    """A file of JSON lines and a tokenizer for it: bytes of text."""
    texts = [Path(file.path).read_bytes().decode(errors="replace") for file in stdlib.find()]
    (folder / "tokenizer.json").write_bytes(from_library(bpe.build(texts, _VOCAB_SIZE)).json_bytes)
    written = 0
    with (folder / "text.jsonl").open("w") as file:
        for text in itertools.cycle(texts):
            if written >= mb * 1e6:
                return written
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def _seconds(folder: Path, ranks: int) -> float:
    out = folder / f"{ranks}"
    shutil.rmtree(out, ignore_errors=True)
    command = ["mpirun", "-np", f"{ranks}", "--oversubscribe", "--bind-to", "none"]
    command += [sys.executable, "-m", "hvdlm.preprocess", f"{folder / 'text.jsonl'}", "--out", f"{out}"]
    command += ["--tokenizer", f"{folder / 'tokenizer.json'}", "--encoder", "reference", "--workers", "1"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"bench scaling: {' '.join(command)}: {done.stderr.strip()[-300:]}", EXIT_CRASH)
    return time.perf_counter() - begun
