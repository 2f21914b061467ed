"""Made-up text to shard, and what became of it."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

SOME = ("--tokenizer", "bpe", "--vocab-size", "300", "--shard-tokens", "150000", "--dedup", "exact")


def write_corpus(folder: Path, *, documents: int = 2400) -> Path:
    """A task a megabyte, in two files: each document has about 3 kB, a quarter of them are there twice."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghij", k=choose.randrange(1, 9))) for _ in range(2000)]
    texts = [" ".join(choose.choices(words, k=choose.randrange(1, 900))) for _ in range(documents)]
    texts += choose.choices(texts, k=documents // 3)
    first = documents * 5 // 6
    for name, part in (("a", texts[:first]), ("b", texts[first:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    return folder


def preprocess_command(corpus: Path, out: Path, *more: str) -> list[str]:
    """The command that shards a corpus, with options under which many shards come of it."""
    return [sys.executable, "-m", "hvdlm.preprocess", str(corpus), "--out", str(out), *SOME, *more]


def contents(folder: Path) -> dict[str, str]:
    """Digests of what is the same every time: every file but the seconds it took."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "seconds.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
