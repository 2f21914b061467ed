"""``repair``: damaged or missing shards made again from their source."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hvdlm.config import EXIT_CRASH, EXIT_DONE
from hvdlm.corpus import repair
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.verify import Problem
from hvdlm.data.verify_all import Verification, verify_tokenizer

HELP = "make bad shards again from the files they were made from"
DESCRIPTION = (
    "Check a data set of preprocess, and make its damaged or missing shards again from their source, byte "
    "for byte. Exit 0: all intact; 1: something is still bad; 2: it cannot be repaired."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `run`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with manifest.json")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: one a core, here %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Repair a data set.

    Returns:
        0 if nothing is wrong with it any more, else 1.

    Raises:
        UserError: it cannot be repaired, or there is no usable manifest.
    """
    folder, manifest = args.folder, read_manifest(args.folder)
    problems = _problems(folder, manifest, args.workers)
    for problem in problems:
        print(f"{folder / problem.file}: bad: {problem.detail}")
    if problems:
        repair.repair(folder, manifest, {problem.file for problem in problems}, workers=args.workers)
        problems = _problems(folder, manifest, args.workers)
    print(f"{folder}: {len(problems)} still bad" if problems else f"{folder}: all intact")
    return EXIT_CRASH if problems else EXIT_DONE


def _problems(folder: Path, manifest: Manifest, workers: int) -> list[Problem]:
    with Verification(folder, manifest, manifest.shards, workers=max(1, workers)) as verification:
        return verify_tokenizer(folder, manifest.tokenizer) + verification.problems()
