"""``python -m hvdlm.dataset verify|inspect DIR``: is a data set intact, and what is in it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from hvdlm.config import EXIT_CRASH, EXIT_DONE, UserError, run_command
from hvdlm.data.documents import read_document
from hvdlm.data.entries import SPLITS, ShardEntry
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.verify_all import verify_folder
from hvdlm.text.tokenizer import load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None = the command line's.

    Returns:
        0; or 1 if `verify` found anything wrong.

    Raises:
        UserError: There is no usable data set or no such document.
    """
    args = _parser().parse_args(argv)
    try:
        code = _verify(args.folder) if args.action == "verify" else _inspect(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a pipe has seen enough; the interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.dataset",
        description="Check or show a folder of HDF5 shards.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="check every digest; exit 1 naming each bad shard and block",
        description="Check the tokenizer and every byte of every shard. Exit 0: all intact; 1: each "
        "problem is one line of stdout; 2: there is no usable manifest.",
        allow_abbrev=False,
    )
    inspect = actions.add_parser(
        "inspect",
        help="print what is inside",
        description="Print the tokenizer and a table of the shards; or one document, decoded.",
        allow_abbrev=False,
    )
    for action in (verify, inspect):
        action.add_argument("folder", metavar="DIR", type=Path, help="folder with manifest.json")
    inspect.add_argument("--document", metavar="K", type=int, help="print document K (from 0) of the split")
    inspect.add_argument("--split", choices=SPLITS, default="train", help="of --document (default: train)")
    return parser


def _verify(folder: Path) -> int:
    manifest = read_manifest(folder)
    file_bytes = sum(entry.file_bytes for entry in manifest.shards)
    started = time.monotonic()
    with tqdm(total=file_bytes, unit="B", unit_scale=True, disable=None, leave=False, desc="verify") as bar:
        problems = verify_folder(folder, report=lambda entry: bar.update(entry.file_bytes))
    for problem in problems:
        _print(f"{folder / problem.file}: bad: {problem.detail}")
    seconds = max(time.monotonic() - started, 1e-3)
    bad_files = len({problem.file for problem in problems})
    _print(
        f"{folder}: {len(manifest.shards)} shards, {file_bytes / 1e6:.1f} MB, "
        f"{file_bytes / 1e6 / seconds:.0f} MB/s: {f'{bad_files} bad' if bad_files else 'all intact'}"
    )
    return EXIT_CRASH if problems else EXIT_DONE


def _inspect(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.folder)
    if args.document is None:
        _print("\n".join(_summary(manifest)))
        return EXIT_DONE
    path = args.folder / manifest.tokenizer.file
    tokenizer = load(path)
    if tokenizer.fingerprint != manifest.tokenizer.sha256:
        raise UserError(f"{path}: not the tokenizer that made the shards (sha256); copy the right one")
    ids = read_document(args.folder, manifest, args.split, args.document)
    _print(tokenizer.decode(ids[:-1].tolist()))
    return EXIT_DONE


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


def _counts(entries: Sequence[ShardEntry]) -> list[str]:
    fields = ("documents", "tokens", "text_bytes", "file_bytes")
    return [f"{sum(getattr(entry, field) for entry in entries):,}" for field in fields]


def _row(name: str, split: str, dtype: str, counts: Sequence[str]) -> str:
    return f"{name:<20} {split:<5} {dtype:>5} " + " ".join(f"{count:>17}" for count in counts)


def _print(text: str) -> None:
    """Print what the terminal's encoding can show, the rest escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(run_command("dataset", main))
