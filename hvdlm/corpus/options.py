"""What a data set is made from: options, inputs, tokenizer; and the record of it that lies in its folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.config import UserError
from hvdlm.corpus import stdlib
from hvdlm.corpus.job import REJECTS_NAME, TOKENIZER_NAME, Keep
from hvdlm.corpus.readers import ReadOptions
from hvdlm.corpus.sources import InputFile, digest, find_inputs
from hvdlm.data.shards import MAX_SHARD_TOKENS
from hvdlm.text import TOKENIZERS, from_sentencepiece, from_tiktoken
from hvdlm.text import tokenizer as tokenizers
from hvdlm.text.tokenizer import Tokenizer, from_library

MIN_SHARD_TOKENS = 16
_KINDS = dict.fromkeys(("eos", "field", "document", "invalid"), str) | dict.fromkeys(
    ("min_chars", "max_chars", "shard_tokens", "seed"), int
)
_ALL = 1 << 62  # Bad records that were allowed once are allowed again.


@dataclass(frozen=True)
class Options:
    """What to make. Defaults are those of the command.

    Attributes:
        out: folder of the data set.
        inputs: files, globs, folders; none = the demo corpus.
        tokenizer: a key of `TOKENIZERS`, trained on the input; the path of a tokenizer.json or of a
            sentencepiece .model; or tiktoken:NAME.
        vocab_size: tokens of a trained tokenizer; 0 = its default (demo corpus: 1024).
        eos: name of the token that ends a document; "" = by its usual names.
        read: how documents are read.
        keep: which are kept.
        val_fraction: share of documents that goes to validation by hash.
        val: inputs for validation, instead of a share.
        shard_tokens: tokens a shard at most.
        seed: of the order of documents.
        encoder: "auto": the fast one where its ids are equal; "reference": Hugging Face tokenizers. It does
            not show in the data set.
    """

    out: Path
    inputs: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    vocab_size: int = 0
    eos: str = ""
    read: ReadOptions = field(default_factory=ReadOptions)
    keep: Keep = field(default_factory=Keep)
    val_fraction: float = 0.05
    val: tuple[str, ...] = ()
    shard_tokens: int = MAX_SHARD_TOKENS
    seed: int = 0
    encoder: str = "auto"


@dataclass(frozen=True)
class Source:
    """What the options name, looked up.

    Attributes:
        files: for training, or to be split by hash.
        val_files: for validation alone.
        tokenizer: the one that was given, None where one is to be built.
        vocab_size: of the one to be built; 0 = its own default.
    """

    files: list[InputFile]
    val_files: list[InputFile]
    tokenizer: Tokenizer | None
    vocab_size: int


def look_up(options: Options) -> Source:
    """Check the options and find what they name.

    Raises:
        UserError: values that cannot be, inputs that are not there, or an unusable tokenizer.
    """
    if not options.val and not 0 < options.val_fraction < 1:
        raise UserError(
            f"--val-fraction {options.val_fraction}: needed more than 0 and less than 1, or --val INPUT"
        )
    if not MIN_SHARD_TOKENS <= options.shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(
            f"--shard-tokens {options.shard_tokens}: needed {MIN_SHARD_TOKENS} to {MAX_SHARD_TOKENS} tokens"
        )
    keep = options.keep
    if keep.max_chars and keep.max_chars < keep.min_chars:
        raise UserError(f"--max-chars {keep.max_chars}: is below --min-chars {keep.min_chars}")
    files = _without_rejects(find_inputs(options.inputs) if options.inputs else stdlib.find(), options.out)
    val_files = _without_rejects(find_inputs(options.val), options.out)
    both = {file.path for file in files} & {file.path for file in val_files}
    if both:
        raise UserError(f"{min(both)}: is both INPUT and --val; leave it out of one of them")
    vocab_size = options.vocab_size
    if options.tokenizer in TOKENIZERS:
        if options.eos:
            raise UserError(
                f"--eos {options.eos}: is for a tokenizer.json; {options.tokenizer} brings its own"
            )
        if options.tokenizer == "bpe" and not options.inputs:
            vocab_size = vocab_size or stdlib.VOCAB_SIZE
        return Source(files, val_files, None, vocab_size)
    return Source(files, val_files, _given_tokenizer(options), vocab_size)


def record(options: Options, source: Source) -> dict[str, Any]:
    """Everything that the data set follows from, as JSON: equal records, equal data sets."""
    given = source.tokenizer
    return {
        "format": "hvdlm-preprocess",
        "version": 1,
        "inputs": _totals(source.files),
        "val": _totals(source.val_files) if options.val else options.val_fraction,
        "tokenizer": f"sha256:{given.fingerprint}" if given else options.tokenizer,
        "vocab_size": given.vocab_size if given else source.vocab_size,
        "eos": options.eos,
        "field": options.read.field,
        "document": options.read.document,
        "invalid": options.read.invalid,
        "dedup": options.keep.dedup,
        "min_chars": options.keep.min_chars,
        "max_chars": options.keep.max_chars,
        "shard_tokens": options.shard_tokens,
        "seed": options.seed,
        # For making a shard again: the only paths in a data set, and no reader needs them.
        "sources": {"inputs": _absolute(options.inputs), "val": _absolute(options.val)},
    }


def from_record(out: Path, made_from: dict[str, Any]) -> Options:
    """The options that a record was made from; its tokenizer is the one that lies in the data set.

    Raises:
        KeyError, TypeError: it is no whole record.
    """
    sources, val = made_from["sources"], made_from["val"]
    for key, kind in _KINDS.items():
        if type(made_from[key]) is not kind:
            raise TypeError(key)
    return Options(
        out,
        tuple(sources["inputs"]),
        str(out / TOKENIZER_NAME),
        eos=made_from["eos"],
        read=ReadOptions(made_from["field"], made_from["document"], made_from["invalid"]),
        keep=Keep(made_from["min_chars"], made_from["max_chars"], _ALL, dedup=made_from["dedup"]),
        val_fraction=val if isinstance(val, float) else Options.val_fraction,
        val=tuple(sources["val"]),
        shard_tokens=made_from["shard_tokens"],
        seed=made_from["seed"],
    )


def _without_rejects(files: list[InputFile], out: Path) -> list[InputFile]:
    """The files but for the rejects that an earlier run listed in a data set inside an input folder."""
    own = os.path.realpath(out / REJECTS_NAME)
    return [file for file in files if file.path != own]


def _absolute(inputs: Sequence[str]) -> list[str]:
    return [_absolute_one(text) for text in inputs]


def _absolute_one(text: str) -> str:
    here = str(Path.cwd())
    if glob.has_magic(text) and not os.path.lexists(text):
        here = glob.escape(here)  # Only what the user wrote is a pattern.
    return os.path.normpath(os.path.join(here, text))  # noqa: PTH118 (a glob is no path)


def _totals(files: Sequence[InputFile]) -> dict[str, Any]:
    return {"files": len(files), "bytes": sum(file.size_bytes for file in files), "digest": digest(files)}


def _given_tokenizer(options: Options) -> Tokenizer:
    given = _load_tokenizer(options.tokenizer, options.eos)
    if options.vocab_size not in (0, given.vocab_size):
        raise UserError(
            f"--vocab-size {options.vocab_size}: {options.tokenizer} has {given.vocab_size} tokens; "
            "leave the option out"
        )
    # Found now rather than after hours.
    _ = given.eos_id
    return given


def _load_tokenizer(name: str, eos: str) -> Tokenizer:
    path = Path(name)
    if name.startswith(from_tiktoken.PREFIX):
        converted = from_tiktoken.build(name.removeprefix(from_tiktoken.PREFIX))
        return from_library(converted, name=name, eos=eos)
    try:
        path.stat()
    except OSError as error:
        raise UserError(
            f"--tokenizer {name}: {error.strerror}; needed {', '.join(TOKENIZERS)}, tiktoken:NAME, or the "
            "path of a tokenizer.json or of a sentencepiece .model"
        ) from None
    if path.suffix == from_sentencepiece.SUFFIX:
        return from_library(from_sentencepiece.build(path), name=name, eos=eos)
    return tokenizers.load(path, eos=eos)
