"""The data sets that a run reads: one, or several that are blended."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.entries import ShardEntry
from hvdlm.data.manifest import Manifest, read_manifest


@dataclass(frozen=True, eq=False)
class Source:
    """A data set and where it lies."""

    folder: Path
    manifest: Manifest


def read_sources(folders: Iterable[str]) -> list[Source]:
    """Read the manifests of data sets that can be read together.

    Args:
        folders: At least one.

    Raises:
        UserError: One is no data set, two were made with different tokenizers, or two are the same.
    """
    sources = [Source(Path(folder), read_manifest(Path(folder))) for folder in folders]
    first, seen = sources[0], dict[str, Path]()
    for source in sources:
        _check_tokenizer(first, source)
        if twin := seen.get(source.manifest.fingerprint):
            raise UserError(
                f"{source.folder}: holds the same tokens as {twin}; name one of them in data.path, with both "
                "weights added"
            )
        seen[source.manifest.fingerprint] = source.folder
    return sources


def shards_of(sources: Sequence[Source], split: str) -> list[tuple[Path, ShardEntry]]:
    """Folder and entry of each shard of a split, through all sources: the order windows are numbered in."""
    return [(source.folder, entry) for source in sources for entry in source.manifest.split(split)]


def tokens_of(sources: Sequence[Source], split: str) -> np.ndarray:
    """Tokens of each shard of a split, int64, in the order of `shards_of`."""
    return np.array([entry.tokens for _, entry in shards_of(sources, split)], dtype=np.int64)


def window_counts(sources: Sequence[Source], split: str, seq_len: int) -> list[int]:
    """Windows of seq_len tokens in a split of each source.

    Raises:
        UserError: A source has none.
    """
    counts = [int((np.maximum(tokens_of([s], split) - 1, 0) // seq_len).sum()) for s in sources]
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise UserError(no_window([source], split, seq_len))
    return counts


def no_window(sources: Sequence[Source], split: str, seq_len: int) -> str:
    """The message of a split that holds no window."""
    folders = ", ".join(str(source.folder) for source in sources)
    longest = max(tokens_of(sources, split), default=0)
    return (
        f"{folders}: split {split!r} has no sample: its longest shard has {longest} tokens, a sample needs "
        f"{seq_len + 1}; preprocess more text or lower data.seq_len"
    )


def _check_tokenizer(first: Source, other: Source) -> None:
    ours, theirs = first.manifest.tokenizer, other.manifest.tokenizer
    if ours.sha256 != theirs.sha256:
        raise UserError(
            f"{other.folder}: was made with tokenizer {theirs.sha256[:12]}, {first.folder} with "
            f"{ours.sha256[:12]}, and a blend needs one; preprocess it again with "
            f"--tokenizer {shlex.quote(str(first.folder / ours.file))}"
        )
    if (ours.eos_id, ours.vocab_size) != (theirs.eos_id, theirs.vocab_size):
        raise UserError(
            f"{other.folder}: ends documents with id {theirs.eos_id} of {theirs.vocab_size}, {first.folder} "
            f"with {ours.eos_id} of {ours.vocab_size}; import or preprocess one of them again"
        )
