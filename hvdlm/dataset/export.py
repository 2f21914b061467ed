"""``export``: the tokens of a data set as files that another program reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hvdlm.config import EXIT_DONE, UserError
from hvdlm.data.entries import SPLITS
from hvdlm.data.manifest import read_manifest
from hvdlm.data.megatron import with_suffix
from hvdlm.data.megatron_writer import write_megatron
from hvdlm.dataset.progress import Progress

HELP = "write the tokens as Megatron-LM's .bin and .idx"
DESCRIPTION = (
    "Write each split as a pair of files of Megatron-LM: PREFIX_train.bin and .idx, PREFIX_val.bin and .idx. "
    "A document is one sequence and ends with eos. What is read is checked."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `run`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with manifest.json")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PREFIX", help="beginning of the files' paths"
    )
    parser.add_argument(
        "--format", choices=("megatron",), default="megatron", help="what to write; default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Write the files.

    Raises:
        UserError: There is no usable data set, a shard is damaged, a file is already there, or the disk
            is full.
    """
    if not args.out.name:
        raise UserError(f"--out {args.out}: is a folder; needed the beginning of the files' names: DIR/NAME")
    manifest = read_manifest(args.folder)
    prefixes = {
        split: args.out.with_name(f"{args.out.name}_{split}") for split in SPLITS if manifest.split(split)
    }
    for prefix in prefixes.values():
        for suffix in ("bin", "idx"):
            if os.path.lexists(file := with_suffix(prefix, suffix)):
                raise UserError(f"{file}: is already there; remove it or choose another --out")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{args.out.parent}: cannot be made: {error.strerror}; choose another --out"
        raise UserError(message) from error
    stored = [entry.extents.tokens for entry in manifest.shards]
    with Progress("export", sum(extent.end - extent.offset for extent in stored)) as progress:
        for split, prefix in prefixes.items():
            write_megatron(args.folder, manifest, split, prefix=prefix, report=progress)
    for split, prefix in prefixes.items():
        print(f"{prefix}: {manifest.documents(split):,} documents, {manifest.tokens(split):,} tokens")
    return EXIT_DONE
