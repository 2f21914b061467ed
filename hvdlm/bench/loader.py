"""This loader beside other ways to read random windows of the same tokens.

Batches are 16 windows of 2049 tokens as int64 tensors. Each reader has a process of its own, stopped while it
is not asked: the threads of some look for work all the time and would slow the others. They take turns, a
slice of time each in every round. A figure is the median over rounds, a ratio the median of the ratios within
one round.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import psutil
import torch

from hvdlm.bench import readers, versions
from hvdlm.config import UserError
from hvdlm.data.entries import TokenizerInfo
from hvdlm.data.manifest import read_manifest, write_manifest
from hvdlm.data.shards import write_shard
from hvdlm.data.sources import read_sources
from hvdlm.data.verify import BackgroundVerifier

_VOCAB_SIZE, _EOS = 50257, 50256
_DOCUMENT_TOKENS = 1000  # On average; their lengths vary as widely as real ones.
_LAST_WORDS_S = 10.0
_WARM_UP_BATCHES = 16  # More than any reader keeps ready.
_OWN, _VERIFYING = "hvdlm", "hvdlm verifying"
_LIBRARIES = ("h5py", "litdata", "mosaicml-streaming", "numpy", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench loader`."""
    parser.add_argument("--tokens", type=int, default=40_000_000, help="made-up tokens (default: 40 million)")
    parser.add_argument("--shards", type=int, default=4, help="shards they lie in (default: 4)")
    parser.add_argument("--rounds", type=int, default=21, help="slices of each reader (default: 21)")
    parser.add_argument("--slice-s", type=float, default=0.3, help="seconds a slice (default: 0.3)")
    parser.add_argument(
        "--windows", type=int, default=1_000_000, help="windows over which memory is watched (default: 10^6)"
    )
    parser.add_argument(
        "--open-shards", type=int, default=10_000, help="shards of a data set that is opened (default: 10^4)"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="NAME,...",
        help="other readers to run (default: all there are)",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every reader that is installed.

    Returns:
        `us`: median microseconds a batch by reader; `ratios`: how many times the loader's time; `memory_mib`:
        how much the loader's process grew over `windows` windows; `open_s`: seconds until a data set of
        `open_shards` shards can be read; `rounds`; `versions`.
    """
    chosen = [name for name in args.only.split(",") if name] or list(readers.installed())
    with tempfile.TemporaryDirectory(prefix="hvdlm-bench-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        write_data(folder, args.tokens, args.shards)
        racers = {n: Racer(n, folder) for n in dict.fromkeys([_OWN, *chosen])}
        for racer in racers.values():
            running.callback(racer.close)
        seconds = _rounds(racers, args.rounds, args.slice_s)
        growth = racers[_OWN].ask("memory", args.windows)
    return {
        **_summary(seconds),
        "memory_mib": growth,
        "windows": args.windows,
        "open_shards": args.open_shards,
        "open_s": open_seconds(args.open_shards),
        "versions": versions.installed(_LIBRARIES),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'reader':<18} {'us a batch':>10} {'windows/s':>10} {'x hvdlm':>8}"]
    for name, us in result["us"].items():
        rate = readers.BATCH / us * 1e6
        lines.append(f"{name:<18} {us:10.1f} {rate:10,.0f} {result['ratios'][name]:8.2f}")
    lines.append(f"memory: {result['memory_mib']:+.1f} MiB over {result['windows']:,} windows")
    lines.append(f"opening {result['open_shards']:,} shards: {result['open_s']:.2f} s")
    lines.append(versions.line(result["versions"]))
    return "\n".join(lines)


def write_data(folder: Path, tokens: int, shards: int) -> None:
    """Shards of random ids, and the same ids in one flat file."""
    info = TokenizerInfo("tokenizer.json", "0" * 64, _VOCAB_SIZE, _EOS)
    entries, size = [], tokens // shards
    with (folder / readers.FLAT_FILE).open("wb") as flat:
        for shard in range(shards):
            rng = np.random.default_rng(shard)
            ids = rng.integers(0, _EOS, size, dtype=np.uint16)
            ids[rng.random(size, np.float32) < 1 / _DOCUMENT_TOKENS] = ids[-1] = _EOS
            ids.tofile(flat)
            offsets = np.concatenate([[0], np.flatnonzero(ids == _EOS) + 1])
            path = folder / f"train-{shard:05}.h5"
            entries.append(write_shard(path, ids, offsets, split="train", text_bytes=1, tokenizer=info))
    write_manifest(folder, entries, tokenizer=info)


def open_seconds(shards: int) -> float:
    """Seconds until the first batch is there: manifest read, sizes compared, no shard but its own opened.

    The shards are one file under many names.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-bench-") as name:
        folder = Path(name)
        write_data(folder, readers.SEQ_LEN * 4, 1)
        (first,) = read_manifest(folder).shards
        entries = [replace(first, name=f"train-{i:05}.h5") for i in range(shards)]
        for entry in entries[1:]:
            (folder / entry.name).hardlink_to(folder / first.name)
        write_manifest(folder, entries, tokenizer=read_manifest(folder).tokenizer)
        begin = time.perf_counter()
        with contextlib.closing(readers.hvdlm_loader(folder)) as source:
            next(source)
            return time.perf_counter() - begin


@final
class Racer:
    """One reader in a process of its own, which works only when asked.

    Args:
        name: Its key in `readers.READERS`.
        folder: What `write_data` wrote.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, folder, theirs))
        self._process.start()
        theirs.close()

    def ask(self, what: str, amount: float) -> float:
        """Seconds a batch over a slice ("time", "verify": seconds), or growth in MiB ("memory": windows).

        Raises:
            UserError: The reader failed; its own traceback is on stderr.
        """
        try:
            self._signal(signal.SIGCONT)
            self._connection.send((what, amount))
            seconds = float(self._connection.recv())
            self._signal(signal.SIGSTOP)
            return seconds
        except (EOFError, OSError) as error:
            raise UserError(
                f"reader {self._name!r} failed, as said above; mend it, or name the others by --only"
            ) from error

    def close(self) -> None:
        """End the process and its workers, those in the middle of a slice after some seconds."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._connection.send(("end", 0))
        self._process.join(_LAST_WORDS_S)
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        """To the process and its workers."""
        # They may have ended, and at first there is no such group yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cast("int", self._process.pid), number)


def _serve(name: str, folder: Path, connection: Connection) -> None:
    # A group of their own: should the benchmark be killed, the kernel sends what is stopped there SIGHUP and
    # SIGCONT, because the group has become an orphan (POSIX, _exit).
    os.setpgid(0, 0)
    # Some libraries greet on stdout, which is the result's.
    with contextlib.redirect_stdout(sys.stderr):
        torch.set_num_threads(1)
        source = readers.READERS[name](folder)
        while True:
            what, amount = connection.recv()
            if what == "end":
                return
            connection.send(_ANSWERS[what](source, folder, amount))


def _time_a_slice(source: Iterator[Any], folder: Path, slice_s: float) -> float:
    """Seconds a batch in a steady state: what lay ready is taken first, and is ready again afterwards."""
    for _ in range(_WARM_UP_BATCHES):
        next(source)
    batches, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < slice_s or not batches:
        next(source)
        batches += 1
    time.sleep(slice_s / 10)
    return passed / batches


def _time_verifying(source: Iterator[Any], folder: Path, slice_s: float) -> float:
    """The same while a thread verifies the data set, which lasts longer than the slice."""
    verifier = BackgroundVerifier(read_sources([str(folder)]), share=(0, 1))
    try:
        return _time_a_slice(source, folder, slice_s)
    finally:
        verifier.close()


def _memory_growth_mib(source: Iterator[Any], folder: Path, windows: float) -> float:
    """How much the resident size grows from a tenth of so many windows to the last."""
    process = psutil.Process()
    for _ in range(int(windows) // 10 // readers.BATCH):
        next(source)
    before = process.memory_info().rss
    for _ in range(int(windows) // readers.BATCH):
        next(source)
    return float((process.memory_info().rss - before) / 2**20)


_ANSWERS = {"time": _time_a_slice, "verify": _time_verifying, "memory": _memory_growth_mib}


def _rounds(racers: dict[str, Racer], rounds: int, slice_s: float) -> dict[str, list[float]]:
    """Seconds a batch of each reader in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in (*racers, _VERIFYING)}
    for _ in range(rounds + 1):
        for name, racer in racers.items():
            seconds[name].append(racer.ask("time", slice_s))
            if name == _OWN:
                seconds[_VERIFYING].append(racer.ask("verify", slice_s))
    return {name: values[1:] for name, values in seconds.items()}


def _summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    own = seconds[_OWN]
    return {
        "us": {name: 1e6 * statistics.median(values) for name, values in seconds.items()},
        "ratios": {
            name: statistics.median(value / base for value, base in zip(values, own, strict=True))
            for name, values in seconds.items()
        },
        "rounds": len(own),
    }
