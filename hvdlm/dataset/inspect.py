"""``inspect``: what is in a data set; or one document, decoded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvdlm.config import EXIT_DONE, UserError
from hvdlm.data.documents import read_document
from hvdlm.data.entries import SPLITS, ShardEntry
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.text.tokenizer import Tokenizer, load

HELP = "print what is inside"
DESCRIPTION = "Print the tokenizer and tables of the splits and shards; or one document, decoded."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `run`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with manifest.json")
    parser.add_argument("--document", metavar="K", type=int, help="print document K (from 0) of the split")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of --document (default: train)")
    parser.add_argument(
        "--ids",
        action="store_true",
        help="print the document's ids, each with its text, the final eos included",
    )


def run(args: argparse.Namespace) -> int:
    """Print a data set's tables, or one of its documents.

    Raises:
        UserError: There is no usable data set or no such document.
    """
    manifest = read_manifest(args.folder)
    if args.document is None:
        if args.ids:
            raise UserError("--ids: whose? add --document K")
        print("\n".join(_summary(manifest)))
        return EXIT_DONE
    tokenizer = _tokenizer(args.folder, manifest)
    ids = read_document(args.folder, manifest, args.split, args.document).tolist()
    if args.ids:
        print("\n".join(f"{id:>7} {tokenizer.decode([id])!r}" for id in ids))
    else:
        print(tokenizer.decode(ids[:-1]))
    return EXIT_DONE


def _tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    path = folder / manifest.tokenizer.file
    tokenizer = load(path)
    if tokenizer.fingerprint != manifest.tokenizer.sha256:
        raise UserError(f"{path}: not the tokenizer that made the shards (sha256); copy the right one")
    return tokenizer


def _summary(manifest: Manifest) -> Iterator[str]:
    tokenizer = manifest.tokenizer
    yield f"tokenizer    {tokenizer.file}: {tokenizer.vocab_size} ids, eos {tokenizer.eos_id}"
    yield f"  sha256     {tokenizer.sha256}"
    yield f"fingerprint  {manifest.fingerprint}"
    yield ""
    yield _row("shard", "split", "dtype", ["documents", "tokens", "text bytes", "file bytes"])
    for entry in manifest.shards:
        yield _row(entry.name, entry.split, entry.extents.tokens.dtype, _counts([entry]))
    for split in SPLITS:
        if entries := manifest.split(split):
            yield _row(f"{len(entries)} in all", split, "", _counts(entries))
    yield ""
    for split in SPLITS:
        if tokens := manifest.tokens(split):
            yield (
                f"{split:<5}  {tokens / manifest.documents(split):,.1f} tokens a document, "
                f"{manifest.text_bytes(split) / tokens:.2f} bytes of text a token"
            )


def _counts(entries: Sequence[ShardEntry]) -> list[str]:
    fields = ("documents", "tokens", "text_bytes", "file_bytes")
    return [f"{sum(getattr(entry, field) for entry in entries):,}" for field in fields]


def _row(name: str, split: str, dtype: str, counts: Sequence[str]) -> str:
    return f"{name:<20} {split:<5} {dtype:>5} " + " ".join(f"{count:>17}" for count in counts)
