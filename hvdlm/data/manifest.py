"""The manifest of a data set: which shards it has, where their tokens lie, what they must contain.

Plain JSON, never HDF5: rank 0 reads it and broadcasts `Manifest.to_json`. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson
import xxhash

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.data.entries import (
    BLOCK_TOKENS,
    Fields,
    MalformedError,
    ShardEntry,
    TokenizerInfo,
    parse_shard,
    parse_tokenizer,
)
from hvdlm.data.files import write_atomic

__all__ = ["Manifest", "ShardEntry", "TokenizerInfo", "read_manifest", "write_manifest"]

FORMAT = "hvdlm-dataset"
VERSION = 1
FILE_NAME = "manifest.json"

MAX_MANIFEST_BYTES = 1 << 28


@dataclass(frozen=True)
class Manifest:
    """A data set: its tokenizer and its shards, in the order that the samples are numbered in."""

    tokenizer: TokenizerInfo
    shards: tuple[ShardEntry, ...]

    def split(self, name: str) -> list[ShardEntry]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        """Tokens in one split."""
        return sum(shard.tokens for shard in self.split(split))

    def documents(self, split: str) -> int:
        """Documents in one split."""
        return sum(shard.documents for shard in self.split(split))

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that one split was made from."""
        return sum(shard.text_bytes for shard in self.split(split))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of what a run consumes: tokenizer, splits, tokens and documents in order.

        Neither paths, nor file names, nor the HDF5 library that wrote the shards enter it.
        """
        content = [[s.split, s.tokens, s.documents, s.content_xxh3_128] for s in self.shards]
        tokenizer = [self.tokenizer.sha256, self.tokenizer.vocab_size, self.tokenizer.eos_id]
        return hashlib.sha256(_json([FORMAT, VERSION, BLOCK_TOKENS, tokenizer, content])).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json, its own digest included.

        Raises:
            ValueError: A number or name that JSON cannot hold.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "shards": self.shards,
        }
        record = orjson.loads(_json(content))  # The fields of a dataclass would not be sorted.
        record["digest"] = xxhash.xxh3_128_hexdigest(_json(record, orjson.OPT_SORT_KEYS))
        return _json(record, orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()

    @staticmethod
    def from_json(text: str, where: str = FILE_NAME) -> Manifest:
        """Parse and check everything that can be checked without the shards.

        Args:
            text: What `to_json` returned, or anything else.
            where: Its origin, for the message.

        Raises:
            UserError: It is not a manifest of this version, or contradicts itself.
        """
        try:
            return _parse(text)
        except ValueError as error:
            raise UserError(
                f"{where}: not a usable manifest ({error}); preprocess or copy the data set again"
            ) from error


def write_manifest(folder: Path, entries: Sequence[ShardEntry], *, tokenizer: TokenizerInfo) -> Manifest:
    """Write `folder`/manifest.json atomically: the last file of a data set.

    Args:
        entries: What `write_shard` returned; sorted here by split, then name.
        tokenizer: Its file lies in `folder`.

    Returns:
        The manifest as readers will see it.

    Raises:
        UserError: The disk is full.
        ValueError: The entries contradict each other, the tokenizer or the format.
    """
    shards = tuple(sorted(entries, key=lambda entry: (entry.split, entry.name)))
    text = Manifest(tokenizer, shards).to_json()
    manifest = _parse(text)
    write_atomic(folder / FILE_NAME, text.encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json; opens no shard.

    Raises:
        UserError: There is none, or `Manifest.from_json` refuses it.
    """
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise UserError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest of hvdlm")
        text = content.decode("ascii")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder}: no {FILE_NAME}, so no data set; run python -m hvdlm.preprocess --out "
            f"{shlex.quote(str(folder))}"
        ) from error
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}; check the file system"
        raise UserError(message, EXIT_CRASH) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a manifest (byte {error.start} is not ASCII); preprocess again"
        ) from error
    return Manifest.from_json(text, str(path))


def read_tokenizer(folder: Path, tokenizer: TokenizerInfo) -> bytes:
    """The bytes of a data set's tokenizer.json.

    Raises:
        UserError: It is missing, or not the one that made the shards.
    """
    path = folder / tokenizer.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; copy the data set again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != tokenizer.sha256:
        raise UserError(
            f"{path}: is tokenizer {found[:12]}, the shards were made with {tokenizer.sha256[:12]}; "
            "copy the data set again or preprocess again"
        )
    return content


_FIELDS = Fields(
    {"format": str, "version": int, "fingerprint": str, "tokenizer": dict, "shards": list, "digest": str}
)


def _json(value: object, option: int = 0) -> bytes:
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError as error:  # Such as "Recursion limit reached".
        raise MalformedError(str(error)) from error


def _parse(text: str) -> Manifest:
    record = orjson.loads(text)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise MalformedError(f"format is not {FORMAT!r}")
    if type(record.get("version")) is not int or record["version"] != VERSION:
        version = repr(record.get("version"))[:20]
        raise MalformedError(f"version is {version}, this hvdlm reads {VERSION}: update hvdlm")
    _FIELDS.check(record, "manifest")
    digest = record.pop("digest")
    if digest != xxhash.xxh3_128_hexdigest(_json(record, orjson.OPT_SORT_KEYS)):
        raise MalformedError("its digest does not match its content: it was edited or damaged")
    tokenizer = parse_tokenizer(record["tokenizer"])
    shards = tuple(parse_shard(shard, tokenizer, f"shard {i}") for i, shard in enumerate(record["shards"]))
    if len({shard.name for shard in shards}) != len(shards):
        raise MalformedError("two shards have one name")
    manifest = Manifest(tokenizer, shards)
    if manifest.fingerprint != record["fingerprint"]:
        raise MalformedError("its fingerprint does not match its shards")
    return manifest
