"""``verify``: is every byte of a data set what was written; in threads, and over ranks."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlm.comm.launch import Launch, process_settings
from hvdlm.config import EXIT_CRASH, EXIT_DONE, ParallelConfig
from hvdlm.data.entries import ShardEntry
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.verify import Problem
from hvdlm.data.verify_all import Verification, share_by_size, verify_tokenizer
from hvdlm.dataset.progress import Progress

if TYPE_CHECKING:
    from hvdlm.comm.world import World

HELP = "check every digest; exit 1 naming each bad shard and block"
DESCRIPTION = (
    "Check the tokenizer and every byte of every shard, in threads, and over the ranks of mpirun or srun. "
    "Exit 0: all intact; 1: each problem is one line of stdout; 2: there is no usable manifest."
)
_MOST_WORKERS = 8
_TOLD_EVERY_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `run`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with manifest.json")
    parser.add_argument(
        "--workers",
        type=_count,
        default=0,
        metavar="N",
        help=f"threads a process; default: one a core, at most {_MOST_WORKERS}",
    )


def run(args: argparse.Namespace, here: Launch) -> int:
    """Check a data set and print what is wrong with it.

    Returns:
        0 if nothing is, else 1; the same on every rank.

    Raises:
        UserError: There is no usable manifest.

    Collective: yes, where `here` has several ranks.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // max(1, here.local_size))
    workers = args.workers or min(cores, _MOST_WORKERS)
    if here.size > 1:
        return _check_on_ranks(args.folder, here, workers)
    manifest = read_manifest(args.folder)
    begun = time.monotonic()
    problems = verify_tokenizer(args.folder, manifest.tokenizer)
    with Progress("verify", _file_bytes(manifest)) as progress:
        problems += _check(
            args.folder, manifest, manifest.shards, workers=workers, tell=_told_alone(progress)
        )
    return _verdict(args.folder, manifest, problems, seconds=time.monotonic() - begun)


def _check(
    folder: Path,
    manifest: Manifest,
    shards: Sequence[ShardEntry],
    *,
    workers: int,
    tell: Callable[[int, bool], bool],
) -> list[Problem]:
    """Check shards in threads; `tell` gets the newly checked bytes and whether these are all, until it
    says that everything is checked."""
    with Verification(folder, manifest, shards, workers=workers) as verification:
        checked = False
        while not checked:
            finished = verification.wait(_TOLD_EVERY_S)
            checked = tell(verification.take_bytes(), finished)
        return verification.problems()


def _told_alone(progress: Progress) -> Callable[[int, bool], bool]:
    def tell(new_bytes: int, finished: bool) -> bool:
        progress(new_bytes)
        return finished

    return tell


def _check_on_ranks(folder: Path, here: Launch, workers: int) -> int:
    # Only here: one process touches neither MPI nor torch.
    from hvdlm.comm import world
    from hvdlm.run import crash

    cores = len(os.sched_getaffinity(0))
    ranks = world.init(here, process_settings(here, ParallelConfig(), env=os.environ, cores=cores, gpus=0))
    try:
        code = _check_together(folder, ranks, workers)
        ranks.close()
        return code
    except world.AgreedError as error:
        ranks.close()
        if ranks.is_root:
            raise
        return error.exit_code
    except BaseException as error:
        crash.end_job("dataset", error, ranks)
        raise


def _check_together(folder: Path, ranks: World, workers: int) -> int:
    """Each rank checks its shards; all learn the verdict, rank 0 prints it.

    Collective: yes.
    """
    agreed = ranks.on_root(lambda: read_manifest(folder).to_json(), name="verify.manifest")
    manifest = Manifest.from_json(agreed, str(folder))
    begun = time.monotonic()
    own = share_by_size(manifest.shards, ranks.size)[ranks.rank]
    problems = verify_tokenizer(folder, manifest.tokenizer) if ranks.is_root else []
    bar = Progress("verify", _file_bytes(manifest)) if ranks.is_root else nullcontext()
    with bar as progress:
        problems += _check(folder, manifest, own, workers=workers, tell=_told_on_ranks(progress, ranks))
    gathered = ranks.gather_json([astuple(problem) for problem in problems], name="verify.problems")
    everywhere = [Problem(*fields) for rank in gathered for fields in rank]
    place = {entry.name: number for number, entry in enumerate(manifest.shards)}
    everywhere.sort(key=lambda problem: place.get(problem.file, -1))
    if not ranks.is_root:
        return EXIT_CRASH if everywhere else EXIT_DONE
    return _verdict(folder, manifest, everywhere, seconds=time.monotonic() - begun)


def _told_on_ranks(progress: Progress | None, ranks: World) -> Callable[[int, bool], bool]:
    """Sums over the ranks, several times a second: a rank that only waited for the slowest one in the
    last collective would be taken for stalled."""
    import torch

    def tell(new_bytes: int, finished: bool) -> bool:
        counts = ranks.sum_(torch.tensor([new_bytes, int(not finished)]), name="verify.progress")
        checked_bytes, busy = counts.tolist()
        if progress is not None:
            progress(checked_bytes)
        return bool(busy == 0)

    return tell


def _verdict(folder: Path, manifest: Manifest, problems: Sequence[Problem], *, seconds: float) -> int:
    for problem in problems:
        print(f"{folder / problem.file}: bad: {problem.detail}")
    megabytes = _file_bytes(manifest) / 1e6
    bad_files = len({problem.file for problem in problems})
    print(
        f"{folder}: {len(manifest.shards)} shards, {megabytes:.1f} MB, "
        f"{megabytes / max(seconds, 1e-3):.0f} MB/s: {f'{bad_files} bad' if bad_files else 'all intact'}"
    )
    return EXIT_CRASH if problems else EXIT_DONE


def _file_bytes(manifest: Manifest) -> int:
    return sum(entry.file_bytes for entry in manifest.shards)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, needed at least 1")
    return value
