"""Running hvdlm as a user does: real launchers, real signals, and no process left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

MPI_OPTIONS = ("--oversubscribe", "--bind-to", "none")
TINY = (
    "--model.layers 1 --model.width 32 --model.heads 2 --model.kv_heads 1 --data.seq_len 32 "
    "--train.global_batch 8 --train.micro_batch 2 --train.steps 20 --optim.warmup_steps 5 "
    "--eval.every 10 --eval.batches 2 --checkpoint.every 10 --log.every 5"
).split()
_TOKEN = "HVDLM_TEST_TOKEN"
# An mpirun in a Slurm job sets the first beside the last, which is then its daemon's.
_RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "SLURM_PROCID")
_LIMIT_S = 120


def train_command(data: Path, out: Path, *more: str) -> list[str]:
    """A short training run of a tiny model."""
    paths = ["--data.path", str(data), "--train.out", str(out)]
    return [sys.executable, "-m", "hvdlm.train", *TINY, *paths, *more]


def mpirun(ranks: int, *more: str) -> list[str]:
    """A launcher line of mpirun, as in the README."""
    return ["mpirun", "-np", str(ranks), *MPI_OPTIONS, *more]


def run(
    command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr are one text. A hang is a failure and leaves nothing behind."""
    with started(command, env or {}, cwd) as process:
        output, _ = process.communicate(timeout=_LIMIT_S)
    return subprocess.CompletedProcess(command, process.returncode, output)


@contextlib.contextmanager
def started(
    command: list[str], env: dict[str, str], cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start in a session of its own; at the end every process of it is killed."""
    token = secrets.token_hex(8)
    root = Path(__file__).parent.parent
    full = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env, _TOKEN: token}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=full,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.token = token  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        for left in family(process):
            with contextlib.suppress(psutil.Error):
                left.kill()
        if process.stdout and not process.stdout.closed:
            process.stdout.close()
        process.wait()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every living process that has `process`'s environment token, orphans included."""
    found = []
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = candidate.status() != psutil.STATUS_ZOMBIE
            if alive and candidate.environ().get(_TOKEN) == process.token:  # type: ignore[attr-defined]
                found.append(candidate)
    return found


def ranks_of(process: subprocess.Popen[str], module: str = "hvdlm.train") -> dict[int, psutil.Process]:
    """The processes of a launcher that run a module of ours, by rank; their workers left out."""
    ranks = {}
    for candidate in family(process):
        with contextlib.suppress(psutil.Error):
            env, command = candidate.environ(), candidate.cmdline()
            rank = next((env[name] for name in _RANK_NAMES if name in env), None)
            runs = module in command or any(word.endswith("_train.py") for word in command)
            if rank is not None and runs and "python" in candidate.name():
                ranks[int(rank)] = candidate
    return ranks


def wait_until(holds: Callable[[], bool], *, within_s: float, what: str) -> float:
    """Poll; the seconds it took.

    Raises:
        AssertionError: it did not come true in time.
    """
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begin


def wait_for_step(run_folder: Path, step: int) -> None:
    """Wait until a running job has done a step."""
    wait_until(
        lambda: any(row["step"] >= step for row in rows(run_folder, "metrics.jsonl", kind="train")),
        within_s=90,
        what=f"step {step} of {run_folder}",
    )


def rows(run_folder: Path, name: str, **fields: Any) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file that have these fields; a line that is being written is left out."""
    path = run_folder / name
    found = []
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        row = json.loads(line)
        if all(row.get(key) == value for key, value in fields.items()):
            found.append(row)
    return found


def losses(run_folder: Path) -> dict[int, float]:
    """Training loss of each step; where a step was done again, the last."""
    return {row["step"]: row["loss"] for row in rows(run_folder, "metrics.jsonl", kind="train")}


def samples(run_folder: Path) -> list[tuple[int, int, int]]:
    """(step, first, end) of the ledger's rows that count."""
    kept: dict[int, tuple[int, int, int]] = {}
    for row in rows(run_folder, "ledger.jsonl"):
        if "resumed_at" in row:
            kept = {step: value for step, value in kept.items() if step < row["resumed_at"]}
        else:
            kept[row["step"]] = (row["step"], row["first_sample"], row["end_sample"])
    return [kept[step] for step in sorted(kept)]


def exit_record(run_folder: Path) -> dict[str, Any]:
    """exit.json."""
    record: dict[str, Any] = json.loads((run_folder / "exit.json").read_text())
    return record


def send(process: psutil.Process | subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to one process alone."""
    os.kill(process.pid, number)


@contextlib.contextmanager
def small_disk(folder: Path, *, size_kib: int) -> Iterator[None]:
    """A real file system of this size at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def preprocess_tiny(folder: Path) -> Path:
    """Shard some made-up text with the byte tokenizer."""
    words = "def return import class for in if else while lambda None True self value index".split()
    choose = random.Random(0)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(40):
        text = "\n".join(" ".join(choose.choices(words, k=8)) for _ in range(20))
        (texts / f"{i:02d}.txt").write_text(text)
    out = folder / "shards"
    command = [sys.executable, "-m", "hvdlm.preprocess", str(texts), "--out", str(out)]
    command += ["--tokenizer", "byte", "--val-fraction", "0.2", "--workers", "1"]
    done = run(command)
    assert done.returncode == 0, done.stdout
    return out
