"""The options of ``python -m hvdlm.preprocess``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from hvdlm.config import UserError
from hvdlm.corpus.job import Keep
from hvdlm.corpus.options import Options
from hvdlm.corpus.readers import ReadOptions
from hvdlm.corpus.sources import KINDS
from hvdlm.text import TOKENIZERS

DEMO_OUT = Path("data/demo")


def parse(argv: Sequence[str] | None) -> tuple[Options, int, bool]:
    """Read the arguments.

    Args:
        argv: without the program's name; None = those of the process.

    Returns:
        What to make; worker processes, 0 = by the cores; whether other things may be replaced.

    Raises:
        UserError: arguments that exclude each other.
    """
    args = _parser().parse_args(argv)
    if args.inputs and args.out is None:
        raise UserError("--out DIR is missing: say where the data set of these inputs shall be")
    if args.val and args.val_fraction is not None:
        raise UserError("--val and --val-fraction exclude each other; leave one out")
    options = Options(
        out=args.out or DEMO_OUT,
        inputs=tuple(args.inputs),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        eos=args.eos,
        read=ReadOptions(args.field, args.document, args.invalid),
        keep=Keep(args.min_chars, args.max_chars, args.max_errors, dedup=args.dedup == "exact"),
        val_fraction=Options.val_fraction if args.val_fraction is None else args.val_fraction,
        val=tuple(args.val),
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        encoder=args.encoder,
    )
    return options, args.workers, args.force


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.preprocess",
        description="Tokenize text once into HDF5 shards for training. Without INPUT it takes the demo "
        "corpus, the sources of Python's standard library.",
        epilog="Under mpirun or srun, or as a job array, all processes make one data set. The same inputs "
        "and options give the same bytes, however many there are. Killed or stopped, the same command goes "
        "on. Exit codes: 0 done, 2 bad usage or input, 75 stopped by a signal, 130 by Ctrl-C, 1 any other "
        "failure.",
        allow_abbrev=False,
    )
    default = Options(DEMO_OUT)
    _add_input(parser, default)
    _add_tokenizer(parser, default)
    _add_filters(parser, default)
    _add_splits(parser, default)
    _add_output(parser, default)
    return parser


def _add_input(parser: argparse.ArgumentParser, default: Options) -> None:
    kinds = " ".join(KINDS)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help=f"files, folders or quoted globs of {kinds}"
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--field",
        default=default.read.field,
        metavar="NAME",
        help="JSON key or Parquet column that holds the text; default: %(default)s",
    )
    group.add_argument(
        "--document",
        choices=("file", "paragraph", "line"),
        default=default.read.document,
        help="a document is a whole file or record, or a paragraph or line of one; default: %(default)s",
    )
    group.add_argument(
        "--invalid",
        choices=("error", "replace", "skip"),
        default=default.read.invalid,
        help="text that is not UTF-8: stop, put U+FFFD in its place, or leave the document out; "
        "default: %(default)s",
    )


def _add_tokenizer(parser: argparse.ArgumentParser, default: Options) -> None:
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer",
        default=default.tokenizer,
        metavar="NAME|PATH",
        help=f"{', '.join(TOKENIZERS)} (bpe and word are trained on the input); tiktoken:NAME; or the path "
        "of a tokenizer.json or of a sentencepiece .model; default: %(default)s",
    )
    group.add_argument(
        "--vocab-size",
        type=_count(0),
        default=default.vocab_size,
        metavar="N",
        help="tokens of a trained tokenizer; default: 32768, for the demo corpus 1024",
    )
    group.add_argument(
        "--eos",
        default=default.eos,
        metavar="TOKEN",
        help="token of a tokenizer.json that ends a document; default: by its usual names",
    )
    group.add_argument(
        "--encoder",
        choices=("auto", "reference"),
        default=default.encoder,
        help="auto: a large input is encoded by the fast encoder, if it gives a sample of it the ids of the "
        "reference, Hugging Face tokenizers",
    )


def _add_filters(parser: argparse.ArgumentParser, default: Options) -> None:
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--dedup", choices=("off", "exact"), default="off", help="exact: of equal documents keep the first"
    )
    for name, meaning in [
        ("--min-chars", "reject documents with fewer characters"),
        ("--max-chars", "reject documents with more characters; 0 = none"),
        ("--max-errors", "bad records to reject before the run fails"),
    ]:
        group.add_argument(
            name,
            type=_count(0),
            default=getattr(default.keep, name[2:].replace("-", "_")),
            metavar="N",
            help=f"{meaning}; default: %(default)s",
        )


def _add_splits(parser: argparse.ArgumentParser, default: Options) -> None:
    group = parser.add_argument_group("splits")
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the documents that goes to validation, each by its own hash, so equal ones stay "
        f"together; default: {default.val_fraction}",
    )
    group.add_argument(
        "--val",
        action="append",
        default=[],
        metavar="INPUT",
        help="take validation from here instead (may be given several times)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="S",
        help="of the order of documents; default: %(default)s",
    )


def _add_output(parser: argparse.ArgumentParser, default: Options) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the data set; for the demo corpus: {DEMO_OUT}"
    )
    group.add_argument("--force", action="store_true", help="replace what DIR holds, or work begun otherwise")
    group.add_argument(
        "--shard-tokens",
        type=_count(1),
        default=default.shard_tokens,
        metavar="N",
        help="tokens a shard at most; default: %(default)s",
    )
    group.add_argument(
        "--workers",
        type=_count(0),
        default=0,
        metavar="N",
        help="processes of each rank; default: one a core, shared among the ranks of a host",
    )


def _count(at_least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text.replace("_", ""))
        if value < at_least:
            raise argparse.ArgumentTypeError(f"found {value}, needed at least {at_least}")
        return value

    return integer
