"""What a checkpoint costs the steps beside it, and how fast it is written beside `dd`.

The real loop trains a model of 100 million parameters and saves every few steps. A step that begins a save,
or during which one is written, is compared with the other steps around it. Between two saves, while the
loop waits, `dd conv=fsync` writes as many bytes to the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

from hvdlm.comm import launch, world
from hvdlm.config import RunConfig, UserError
from hvdlm.config.parse import load_config
from hvdlm.corpus import demo
from hvdlm.data.loader import Loader, StepBatch
from hvdlm.run import ledger
from hvdlm.run.saver import Saver
from hvdlm.run.standing import METRICS_FILE
from hvdlm.train.agree import agree_on_start
from hvdlm.train.loop import train
from hvdlm.train.session import open_session

_MODEL = "--model.layers 14 --model.width 768 --model.heads 12 --model.kv_heads 12 --data.seq_len 512".split()
_SECONDS = ("snapshot_s", "write_s", "commit_s", "stall_s")
_QUIET = "--eval.batches 0 --eval.every 0 --log.every 1000000 --data.verify off".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench save`."""
    parser.add_argument("--saves", type=int, default=5, help="checkpoints to time (default: 5)")
    parser.add_argument("--every", type=int, default=6, help="steps from one to the next (default: 6)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 512 tokens a step (default: 4)")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="to compute in (default: fp32)"
    )
    parser.add_argument("--layers", type=int, default=14, help="blocks of 7 M parameters (default: 14)")
    parser.add_argument("--folder", default="", help="file system to write to (default: that of $TMPDIR)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps and the writing.

    Returns:
        `step_s` (median of the steps that have nothing to do with a save); `saving` and `worst`, the mean
        and the longest of the steps from one that saves to that in which it is committed, over the mean
        of the other steps between two saves (medians over the saves); `save_mb_s`, `dd_mb_s` and
        `write`, the median ratio of both; `snapshot_s`, `commit_s` and `stall_s` (medians), and `bytes`.
    """
    # The first save pays for fresh pages and is left out, and so is the last, at which the run waits.
    steps = (args.saves + 2) * args.every
    with (
        tempfile.TemporaryDirectory(dir=args.folder or None) as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        flags = ["--train.steps", str(steps), "--checkpoint.every", str(args.every), "--train.out", folder]
        flags += ["--train.global_batch", str(args.batch), "--train.micro_batch", str(args.batch)]
        flags += [*_MODEL, "--model.layers", str(args.layers), "--train.precision", args.precision, *_QUIET]
        config, _ = load_config(flags, prog="bench save")
        for data_folder in config.data.weights:
            demo.prepare(Path(data_folder))
        alone = launch.Launch("single")
        settings = launch.process_settings(
            alone, config.parallel, env=os.environ, cores=len(os.sched_getaffinity(0)), gpus=0
        )
        ranks = world.init(alone, settings)
        pacer = _run(config, Path(folder), ranks)
        ranks.close()
        saved = _save_rows(Path(folder))[1:-1]
    return _summary(pacer, saved, args.every)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    return (
        f"a step {result['step_s']:.2f} s; {result['saves']} saves of {result['bytes'] / 1e6:,.0f} MB\n"
        f"steps from a save to its commit {result['saving']:.3f} of another step, the worst of them "
        f"{result['worst']:.3f}\n"
        f"snapshot {result['snapshot_s']:.3f} s, commit {result['commit_s']:.3f} s, the run waited "
        f"{result['stall_s']:.3f} s\n"
        f"written at {result['save_mb_s']:.0f} MB/s, dd conv=fsync {result['dd_mb_s']:.0f} MB/s: "
        f"{result['write']:.2f}"
    )


@dataclass(frozen=True)
class Timed:
    """A step of the loop: its number, seconds, and whether a save was in flight at its begin or end."""

    step: int
    seconds: float
    saves: bool


@final
class Pacer:
    """A loader that times what happens between its batches, and lets `dd` write in the pauses.

    Attributes:
        timed: the steps.
        dd_mb_s: what dd reached before each save but the first.
    """

    def __init__(self, loader: Loader, saver: Saver, run_folder: Path, *, every: int) -> None:
        self.timed: list[Timed] = []
        self.dd_mb_s: list[float] = []
        self._loader = loader
        self._saver = saver
        self._run_folder = run_folder
        self._every = every

    def steps(self, start_step: int) -> Iterator[StepBatch]:
        """The loader's steps."""
        for batch in self._loader.steps(start_step):
            if batch.step % self._every == 0 and not self._saver.in_flight and self._size_bytes():
                self.dd_mb_s.append(_dd_mb_s(self._run_folder, self._size_bytes()))
            began_s, in_flight = time.perf_counter(), self._saver.in_flight
            yield batch
            seconds = time.perf_counter() - began_s
            self.timed.append(Timed(batch.step, seconds, in_flight or self._saver.in_flight))

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()

    def _size_bytes(self) -> int:
        """Of the last checkpoint; 0 before the first."""
        rows = _save_rows(self._run_folder)
        return int(rows[-1]["bytes"]) if rows else 0


def _run(config: RunConfig, run_folder: Path, ranks: world.World) -> Pacer:
    session = open_session(config, run_folder, ranks, agree_on_start(config, run_folder, ranks))
    pacer = Pacer(session.loader, session.saver, run_folder, every=config.checkpoint.every)
    train(replace(session, loader=cast(Loader, pacer)))
    return pacer


def _save_rows(run_folder: Path) -> list[dict[str, Any]]:
    return [row for row in ledger.read_rows(run_folder / METRICS_FILE) if row["kind"] == "save"]


def _dd_mb_s(folder: Path, size_bytes: int) -> float:
    """What a plain sequential write of as many bytes reaches, until it is durable."""
    target, block_bytes = folder / "dd", 2**22
    command = ["dd", "if=/dev/zero", f"of={target}", f"bs={block_bytes}", "conv=fsync"]
    began_s = time.perf_counter()
    done = subprocess.run([*command, f"count={size_bytes // block_bytes}"], capture_output=True, check=False)
    seconds = time.perf_counter() - began_s
    if done.returncode:
        raise UserError(f"{target}: dd failed: {done.stderr.decode().strip()}; choose another --folder")
    target.unlink()
    return size_bytes // block_bytes * block_bytes / seconds / 1e6


def _summary(pacer: Pacer, saved: list[dict[str, Any]], every: int) -> dict[str, Any]:
    """Medians over the saves.

    Args:
        pacer: what it timed.
        saved: the rows of the saves that count, one after another.
        every: steps from one to the next.

    Raises:
        UserError: the saves took so long that no other step is left to compare with.
    """
    means, worst = [], []
    for row in saved:
        near = [t for t in pacer.timed if row["step"] <= t.step < row["step"] + every]
        saving, others = ([t.seconds for t in near if t.saves is kind] for kind in (True, False))
        if len(others) < 2:
            raise UserError(
                f"a save takes {len(saving)} steps; raise --every {every} above that and two more"
            )
        means.append(statistics.mean(saving) / statistics.mean(others))
        worst.append(max(saving) / statistics.mean(others))
    save_mb_s = [row["bytes"] / row["write_s"] / 1e6 for row in saved]
    dd_mb_s = pacer.dd_mb_s[: len(saved)]
    others = [t.seconds for t in pacer.timed if not t.saves and t.step > every]
    return {
        "step_s": statistics.median(others),
        "saving": statistics.median(means),
        "worst": statistics.median(worst),
        "save_mb_s": statistics.median(save_mb_s),
        "dd_mb_s": statistics.median(dd_mb_s),
        "write": statistics.median(s / d for s, d in zip(save_mb_s, dd_mb_s, strict=True)),
        **{
            key: statistics.median(row[key] for row in saved) for key in ("snapshot_s", "commit_s", "stall_s")
        },
        "bytes": saved[0]["bytes"],
        "saves": len(saved),
    }
