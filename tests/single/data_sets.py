"""Small real data sets for the tests of hvdlm.data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from hvdlm.data.files import RECORD_NAME
from hvdlm.data.manifest import Manifest, TokenizerInfo, write_manifest
from hvdlm.data.shards import write_shard

TOKENIZER_BYTES = b'{"any": "bytes"}'
EOS = 0


def tokenizer_info(vocab_size: int = 300) -> TokenizerInfo:
    return TokenizerInfo("tokenizer.json", hashlib.sha256(TOKENIZER_BYTES).hexdigest(), vocab_size, EOS)


def random_documents(count: int, *, seed: int, vocab_size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Exactly `count` tokens in documents of about 50: ids and doc_offsets."""
    ids = np.random.default_rng(seed).integers(1, vocab_size, count)
    ids[49::50] = EOS
    ids[-1] = EOS
    return ids, np.concatenate([[0], np.flatnonzero(ids == EOS) + 1])


def make_data_set(
    folder: Path, sizes: dict[str, int], *, vocab_size: int = 300
) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Write shards of so many tokens under names like "train-00000": the manifest, and the ids by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER_BYTES)
    (folder / RECORD_NAME).write_text("{}")
    info = tokenizer_info(vocab_size)
    entries, tokens = [], {}
    for seed, (name, count) in enumerate(sizes.items()):
        ids, offsets = random_documents(count, seed=seed, vocab_size=vocab_size)
        split = name.split("-")[0]
        path = folder / f"{name}.h5"
        entries.append(write_shard(path, ids, offsets, split=split, text_bytes=3 * count, tokenizer=info))
        tokens[path.name] = ids
    return write_manifest(folder, entries, tokenizer=info), tokens


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
