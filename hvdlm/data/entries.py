"""The records of a manifest: what is known of one shard and of the tokenizer, strictly checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

SPLITS = ("train", "val")
BLOCK_TOKENS = 1 << 20
"""Tokens covered by one digest of /block_xxh3."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.h5")
_TOKENIZER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.json")
_LARGEST = 1 << 44  # 16 TiB a shard: sums over any manifest stay below 2^63.
_HEX = re.compile(r"[0-9a-f]+")


class MalformedError(ValueError):
    """A manifest or shard that does not follow its format; the message says what is wrong."""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids: file name inside the folder, sha256 hex of that file's bytes,
    largest id (added tokens included) + 1, and the id that ends every document."""

    file: str
    sha256: str
    vocab_size: int
    eos_id: int

    @property
    def token_dtype(self) -> str:
        """`<u2` if and only if the largest id fits."""
        return "<u2" if self.vocab_size - 1 <= 0xFFFF else "<u4"


@dataclass(frozen=True)
class Extent:
    """Where a contiguous data set lies in its file: byte offset, numpy dtype, size in elements."""

    offset: int
    dtype: str
    size: int

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + self.size * int(self.dtype[2:])


@dataclass(frozen=True)
class Extents:
    """The three data sets of a shard."""

    tokens: Extent
    doc_offsets: Extent
    block_xxh3: Extent


@dataclass(frozen=True)
class ShardEntry:
    """One shard: counts, size, digest of the whole file, and where its data sets lie.

    `content_xxh3_128` digests the raw bytes of /block_xxh3, then of /doc_offsets: equal for equal
    tokens and documents, whichever HDF5 library wrote the file.
    """

    name: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    xxh3_128: str
    content_xxh3_128: str
    extents: Extents


def check_fields(value: object, kinds: dict[str, type], where: str) -> dict[str, Any]:
    """Check that a JSON value is an object with exactly these fields of exactly these types.

    Raises:
        MalformedError: It is not, or an integer is negative or absurdly large.
    """
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise MalformedError(f"{where}: needs exactly the fields {', '.join(kinds)}")
    for key, kind in kinds.items():
        # bool is an int to isinstance; JSON's true must not pass for a count.
        if type(value[key]) is not kind:
            raise MalformedError(f"{where}: {key} must be {kind.__name__}")
        if kind is int and not 0 <= value[key] < _LARGEST:
            raise MalformedError(f"{where}: {key} is out of range")
    return cast("dict[str, Any]", value)


def parse_tokenizer(value: object) -> TokenizerInfo:
    """Check and convert the JSON object of a tokenizer.

    Raises:
        MalformedError: It has another shape or contradicts itself.
    """
    fields = check_fields(value, {"file": str, "sha256": str, "vocab_size": int, "eos_id": int}, "tokenizer")
    info = TokenizerInfo(**fields)
    if not _TOKENIZER_NAME.fullmatch(info.file):
        raise MalformedError("tokenizer: file must be a plain name ending in .json")
    if len(info.sha256) != 64 or not _HEX.fullmatch(info.sha256):
        raise MalformedError("tokenizer: sha256 must be 64 hexadecimal digits")
    if not 0 <= info.eos_id < info.vocab_size <= 1 << 32:
        raise MalformedError("tokenizer: needs 0 <= eos_id < vocab_size <= 2^32")
    return info


_SHARD_KINDS: dict[str, type] = {
    "name": str,
    "split": str,
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "file_bytes": int,
    "xxh3_128": str,
    "content_xxh3_128": str,
    "extents": dict,
}
_EXTENTS_KINDS: dict[str, type] = {"tokens": dict, "doc_offsets": dict, "block_xxh3": dict}
_EXTENT_KINDS: dict[str, type] = {"offset": int, "dtype": str, "size": int}


def parse_shard(value: object, tokenizer: TokenizerInfo, where: str) -> ShardEntry:
    """Check and convert the JSON object of a shard.

    Args:
        value: Anything that JSON can hold.
        tokenizer: Decides the dtype of the tokens.
        where: Names the shard in the message.

    Raises:
        MalformedError: It has another shape or contradicts itself.
    """
    fields = check_fields(value, _SHARD_KINDS, where)
    parts = check_fields(fields["extents"], _EXTENTS_KINDS, where)
    extents = {name: Extent(**check_fields(part, _EXTENT_KINDS, where)) for name, part in parts.items()}
    entry = ShardEntry(**{**fields, "extents": Extents(**extents)})
    if not _SHARD_NAME.fullmatch(entry.name):
        raise MalformedError(f"{where}: name must be a plain file name ending in .h5")
    if entry.split not in SPLITS:
        raise MalformedError(f"{where}: split must be one of {', '.join(SPLITS)}")
    for digest in (entry.xxh3_128, entry.content_xxh3_128):
        if len(digest) != 32 or not _HEX.fullmatch(digest):
            raise MalformedError(f"{where}: a digest must be 32 hexadecimal digits")
    check_extents(entry, tokenizer)
    return entry


def check_extents(entry: ShardEntry, tokenizer: TokenizerInfo) -> None:
    """Check that the data sets have the dtype and size their counts ask for, lie in the file and apart.

    Raises:
        MalformedError: They do not.
    """
    tokens, doc_offsets, blocks = entry.extents.tokens, entry.extents.doc_offsets, entry.extents.block_xxh3
    if not 1 <= entry.documents <= entry.tokens:
        raise MalformedError(f"{entry.name}: needs 1 <= documents <= tokens")
    expected = (
        ("tokens", tokens, tokenizer.token_dtype, entry.tokens),
        ("doc_offsets", doc_offsets, "<u8", entry.documents + 1),
        ("block_xxh3", blocks, "<u8", -(-entry.tokens // BLOCK_TOKENS)),
    )
    for name, extent, dtype, size in expected:
        if (extent.dtype, extent.size) != (dtype, size):
            found = f"{extent.dtype[:20]!r} [{extent.size}]"
            raise MalformedError(f"{entry.name}: {name} must be {dtype} [{size}], is {found}")
        if extent.end > entry.file_bytes:
            raise MalformedError(f"{entry.name}: {name} ends after the file")
    ordered = sorted((tokens, doc_offsets, blocks), key=lambda extent: extent.offset)
    if any(first.end > second.offset for first, second in pairwise(ordered)):
        raise MalformedError(f"{entry.name}: data sets overlap")
