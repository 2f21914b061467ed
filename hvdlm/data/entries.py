"""The records of a manifest: what is known of one shard and of the tokenizer, strictly checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, cast, final, get_type_hints

SPLITS = ("train", "val")
BLOCK_TOKENS = 1 << 20
"""Tokens covered by one digest of /block_xxh3."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.h5")
_TOKENIZER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.json")
_LARGEST = 1 << 44  # 16 TiB a shard: sums over any manifest stay below 2^63.
_DIGEST, _SHA256 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")


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


@final
class Fields:
    """What a JSON object must have: exactly these fields, of exactly these types.

    A data set may have ten thousand shards of five objects each, so what is right is seen to be so with
    a few calls into C.

    Args:
        kinds: Name and type of at least two fields.
    """

    def __init__(self, kinds: Mapping[str, type]) -> None:
        self._kinds, self._values = dict(kinds), itemgetter(*kinds)
        # Types, not isinstance: bool is an int, and JSON's true must not pass for a count.
        self._types = tuple(kinds.values())
        self._integers = [index for index, kind in enumerate(self._types) if kind is int]

    @staticmethod
    def of(record: type) -> Fields:
        """Those of a dataclass, in its order; one that is a dataclass itself is an object of its own."""
        kinds = get_type_hints(record).items()
        return Fields({name: dict if is_dataclass(kind) else kind for name, kind in kinds})

    def check(self, value: object, where: str) -> tuple[Any, ...]:
        """The values of the fields, in order.

        Raises:
            MalformedError: It is not such an object, or an integer is negative or absurdly large.
        """
        if type(value) is not dict or value.keys() != self._kinds.keys():
            raise MalformedError(f"{where}: needs exactly the fields {', '.join(self._kinds)}")
        values = self._values(value)
        if tuple(map(type, values)) != self._types:
            wrong = next(key for key, kind in self._kinds.items() if type(value[key]) is not kind)
            raise MalformedError(f"{where}: {wrong} must be {self._kinds[wrong].__name__}")
        for index in self._integers:
            if not 0 <= values[index] < _LARGEST:
                raise MalformedError(f"{where}: {list(self._kinds)[index]} is out of range")
        return cast("tuple[Any, ...]", values)


_TOKENIZER, _SHARD = Fields.of(TokenizerInfo), Fields.of(ShardEntry)
_EXTENTS, _EXTENT = Fields.of(Extents), Fields.of(Extent)


def parse_tokenizer(value: object) -> TokenizerInfo:
    """Check and convert the JSON object of a tokenizer.

    Raises:
        MalformedError: It has another shape or contradicts itself.
    """
    info = TokenizerInfo(*_TOKENIZER.check(value, "tokenizer"))
    if not _TOKENIZER_NAME.fullmatch(info.file):
        raise MalformedError("tokenizer: file must be a plain name ending in .json")
    if not _SHA256.fullmatch(info.sha256):
        raise MalformedError("tokenizer: sha256 must be 64 hexadecimal digits")
    if not 0 <= info.eos_id < info.vocab_size <= 1 << 32:
        raise MalformedError("tokenizer: needs 0 <= eos_id < vocab_size <= 2^32")
    return info


def parse_shard(value: object, tokenizer: TokenizerInfo, where: str) -> ShardEntry:
    """Check and convert the JSON object of a shard.

    Args:
        value: Anything that JSON can hold.
        tokenizer: Decides the dtype of the tokens.
        where: Names the shard in the message.

    Raises:
        MalformedError: It has another shape or contradicts itself.
    """
    # In the order of the classes' fields, of which "extents" is the last.
    *values, extents = _SHARD.check(value, where)
    parts = [Extent(*_EXTENT.check(part, where)) for part in _EXTENTS.check(extents, where)]
    entry = ShardEntry(*[*values, Extents(*parts)])
    if not _SHARD_NAME.fullmatch(entry.name):
        raise MalformedError(f"{where}: name must be a plain file name ending in .h5")
    if entry.split not in SPLITS:
        raise MalformedError(f"{where}: split must be one of {', '.join(SPLITS)}")
    for digest in (entry.xxh3_128, entry.content_xxh3_128):
        if not _DIGEST.fullmatch(digest):
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
    spans = []
    for name, extent, dtype, size in expected:
        if extent.dtype != dtype or extent.size != size:
            found = f"{extent.dtype[:20]!r} [{extent.size}]"
            raise MalformedError(f"{entry.name}: {name} must be {dtype} [{size}], is {found}")
        spans.append((extent.offset, extent.end))
        if spans[-1][1] > entry.file_bytes:
            raise MalformedError(f"{entry.name}: {name} ends after the file")
    spans.sort()
    if any(first_end > second for (_, first_end), (second, _) in pairwise(spans)):
        raise MalformedError(f"{entry.name}: data sets overlap")
