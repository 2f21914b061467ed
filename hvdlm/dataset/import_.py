"""``import``: token files of other programs become a data set."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from hvdlm.config import EXIT_DONE, UserError
from hvdlm.corpus import crew as crews
from hvdlm.corpus import hold
from hvdlm.data.chunks import Chunk, by_split, in_vocabulary, with_eos
from hvdlm.data.entries import SPLITS, TokenizerInfo
from hvdlm.data.files import TEMP_PREFIX, write_atomic
from hvdlm.data.manifest import Manifest, write_manifest
from hvdlm.data.megatron import open_index, read_megatron
from hvdlm.data.nanogpt import file_size, read_nanogpt
from hvdlm.data.repack import Repacker
from hvdlm.data.shards import MAX_SHARD_TOKENS
from hvdlm.dataset.progress import Progress
from hvdlm.text.id_bytes import id_bytes
from hvdlm.text.tokenizer import load

HELP = "make a data set from token files of Megatron-LM or nanoGPT"
DESCRIPTION = (
    "Make a data set from token files, without encoding anything again, in bounded memory. The same files "
    "and options give the same bytes."
)
_WORK_NAME = f"{TEMP_PREFIX}import"
_VAL_FRACTION = 0.05
_MIN_SHARD_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `run`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="for megatron the PREFIX of PREFIX.bin and PREFIX.idx, for nanogpt the file",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=("megatron", "nanogpt"),
        help="megatron: documents by the index; nanogpt: uint16 ids without a header, documents end at eos",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="PATH", help="tokenizer.json that made the ids"
    )
    parser.add_argument(
        "--eos", default="", metavar="TOKEN", help="token that ends a document; default: by its usual names"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the data set")
    splits = parser.add_mutually_exclusive_group()
    splits.add_argument(
        "--val-fraction",
        type=float,
        default=_VAL_FRACTION,
        metavar="F",
        help="share of the documents that goes to validation, each by the hash of its ids; "
        "default: %(default)s",
    )
    splits.add_argument(
        "--val",
        action="append",
        default=[],
        type=Path,
        metavar="INPUT",
        help="take validation from here instead (may be given several times)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=MAX_SHARD_TOKENS,
        metavar="N",
        help="tokens a shard at most; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Make the data set.

    Raises:
        UserError: An input is missing, truncated or something else, has ids that the tokenizer does not
            know, a split is empty, or the disk is full.
    """
    _check(args)
    inputs, val = ([_named(path, args.format) for path in paths] for paths in (args.inputs, args.val))
    real = {os.path.realpath(path) for path in inputs}
    if both := [path for path in val if os.path.realpath(path) in real]:
        raise UserError(f"{both[0]}: is both INPUT and --val; leave it out of one of them")
    tokenizer = load(args.tokenizer, eos=args.eos)
    info = TokenizerInfo("tokenizer.json", tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
    # Every input is looked at here: a truncated one is found before hours of work.
    total_bytes = sum(_token_bytes(path, args.format) for path in (*inputs, *val))
    held = hold.claimed(args.out, _WORK_NAME, wait=False, crew=crews.alone())
    with held, _work_folder(args.out) as work:
        write_atomic(work / info.file, tokenizer.json_bytes)
        with (
            _writers(work, info, id_bytes(tokenizer), args.shard_tokens) as writers,
            Progress("import", total_bytes) as progress,
        ):

            def read(paths: Sequence[Path]) -> Iterator[Chunk]:
                for path in paths:
                    yield from _read(path, args.format, info, progress)

            parted = (
                (("train", c) for c in read(inputs)) if val else by_split(read(inputs), args.val_fraction)
            )
            for split, chunk in chain(parted, (("val", c) for c in read(val))):
                writers[split].add(chunk)
            for writer in writers.values():
                writer.close()
        manifest = _install(args.out, work, writers, info)
    _say_made(args.out, manifest)
    return EXIT_DONE


def _check(args: argparse.Namespace) -> None:
    if not args.val and not 0 < args.val_fraction < 1:
        raise UserError(
            f"--val-fraction {args.val_fraction}: needed more than 0 and less than 1, or --val INPUT"
        )
    if not _MIN_SHARD_TOKENS <= args.shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(
            f"--shard-tokens {args.shard_tokens}: needed {_MIN_SHARD_TOKENS} to {MAX_SHARD_TOKENS} tokens"
        )


def _named(path: Path, kind: str) -> Path:
    """The input that a user means: a prefix may be given with the suffix of either file."""
    if not path.name:
        raise UserError(f"{path}: is a folder; needed {'a PREFIX' if kind == 'megatron' else 'a file'} in it")
    if kind == "megatron":
        return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and os.path.lexists(index):
        raise UserError(f"{path}: {index.name} lies beside it, so it is of Megatron-LM; --format megatron")
    return path


def _token_bytes(path: Path, kind: str) -> int:
    return open_index(path).bin_bytes if kind == "megatron" else file_size(path)


def _read(path: Path, kind: str, info: TokenizerInfo, report: Callable[[int], None]) -> Iterator[Chunk]:
    """Documents as shards hold them: known ids, each document ending with eos."""

    def counted(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            report(chunk.tokens.nbytes)
            yield chunk

    chunks = read_megatron(path) if kind == "megatron" else read_nanogpt(path, info.eos_id)
    yield from with_eos(in_vocabulary(counted(chunks), info, where=str(path)), info.eos_id)


@contextmanager
def _writers(
    work: Path, info: TokenizerInfo, text: np.ndarray, shard_tokens: int
) -> Iterator[dict[str, Repacker]]:
    with ExitStack() as stack:
        yield {
            split: stack.enter_context(
                Repacker(work, split, shard_tokens=shard_tokens, tokenizer=info, id_bytes=text)
            )
            for split in SPLITS
        }


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out`, which must be empty but for what was left unfinished; gone in the end."""
    work = out / _WORK_NAME
    try:
        if any(not path.name.startswith(TEMP_PREFIX) for path in out.iterdir()):
            raise UserError(f"{out}: is not empty; choose another --out, or remove it")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}; choose another --out") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _install(out: Path, work: Path, writers: dict[str, Repacker], info: TokenizerInfo) -> Manifest:
    """Move everything into place, the manifest last."""
    counts = {split: sum(e.documents for e in writer.entries) for split, writer in writers.items()}
    if not all(counts.values()):
        raise UserError(
            f"a split is empty: train has {counts['train']} documents, val has {counts['val']}; "
            "give more documents, change --val-fraction, or name other inputs by --val"
        )
    entries = [entry for writer in writers.values() for entry in writer.entries]
    for name in (info.file, *(entry.name for entry in entries)):
        (work / name).rename(out / name)
    return write_manifest(out, entries, tokenizer=info)


def _say_made(out: Path, manifest: Manifest) -> None:
    for split in SPLITS:
        print(f"{split:<6} {manifest.documents(split):,} documents, {manifest.tokens(split):,} tokens")
    print(f"folder {out}")
    print(f"next   horovodrun -np 2 python -m hvdlm.train --data.path {shlex.quote(str(out))}")
