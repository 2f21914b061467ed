"""A stop and a new start of a tiny run, by the launcher of the real one, with their times."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdlm.cluster.bounded import run_bounded
from hvdlm.cluster.queue import ASK_LIMIT_S
from hvdlm.config import EXIT_CRASH, EXIT_REQUEUE, UserError
from hvdlm.run import exit_record, ledger
from hvdlm.run.standing import METRICS_FILE

_STEP = "hvdlm-rehearse"
_MORE_STEPS = 5
_FIRST_STEPS = 3
_POLL_S = 0.05
_ENDLESS = 1_000_000
# What is small of any configuration; where the data lie, how ranks share a step and the rest are the user's.
_TINY = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.mlp_width": 0,
    "model.compile": "false",
    "model.init": "random",
    "data.seq_len": 32,
    "data.max_epochs": 0,
    "data.new_stage": "false",
    "data.stage": "",
    "data.verify": "off",
    "train.tokens": 0,
    "train.micro_batch": 1,
    "optim.schedule": "constant",
    "optim.warmup_steps": 1,
    "eval.every": 0,
    "checkpoint.every": _ENDLESS,
    "checkpoint.keep_best": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.resume": "auto",
    "log.every": _ENDLESS,
    "log.profile": 0,
    "log.tensorboard": "false",
    "log.timeline": "false",
}


@final
@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        start_s: from the launcher's start to the first step.
        stop_s: from the signal to the launcher's end, with a checkpoint of a tiny model.
        resume_s: from the next launcher's start to the step after the last.
    """

    start_s: float
    stop_s: float
    resume_s: float


def rehearse(scratch: Path, arguments: Sequence[str], *, mpi: str, tasks: int, limit_s: float) -> Times:
    """Start, signal, wait for the end, start again, do a few steps.

    Args:
        scratch: a run folder for it.
        arguments: those of train.
        mpi: a type of `srun --mpi`, or mpirun.
        tasks: of this job.
        limit_s: seconds for each thing that is waited for.

    Raises:
        UserError: something did not happen, or not in time.
    """
    tiny = [word for key, value in _TINY.items() for word in (f"--{key}", str(value))]
    tiny += ["--train.out", str(scratch), "--train.global_batch", str(tasks)]
    train = [*_launcher(mpi), sys.executable, "-m", "hvdlm.train", *arguments, *tiny]
    begin = time.monotonic()
    with _started([*train, "--train.steps", str(_ENDLESS)], scratch) as process:
        _wait(lambda: _step(scratch) >= 1, process, limit_s=limit_s, what="a first step", scratch=scratch)
        start_s = time.monotonic() - begin
        _wait(lambda: _step(scratch) >= _FIRST_STEPS, process, limit_s=limit_s, what="steps", scratch=scratch)
        told = time.monotonic()
        _signal(process, mpi)
        _wait_for_end(process, limit_s=limit_s, scratch=scratch)
        stop_s = time.monotonic() - told
    stopped = exit_record.read(scratch)
    if (stopped.get("state"), stopped.get("exit_code")) != ("stopped", EXIT_REQUEUE):
        raise _failed(f"after the signal exit.json says {stopped.get('state')}", scratch)
    begin = time.monotonic()
    last = int(stopped["step"])
    with _started([*train, "--train.steps", str(last + _MORE_STEPS)], scratch) as process:
        _wait(lambda: _step(scratch) > last, process, limit_s=limit_s, what="a resumed step", scratch=scratch)
        resume_s = time.monotonic() - begin
        _wait_for_end(process, limit_s=limit_s, scratch=scratch)
    rows = ledger.read_rows(scratch / ledger.FILE_NAME)
    resumed = [row["resumed_at"] for row in rows if "resumed_at" in row]
    if exit_record.read(scratch).get("state") != "done" or resumed[-1] != last + 1:
        raise _failed(f"the next start did not go on at step {last + 1}", scratch)
    return Times(start_s, stop_s, resume_s)


def _launcher(mpi: str) -> list[str]:
    """As the batch script starts ranks."""
    container = shlex.split(os.environ.get("HVDLM_CONTAINER", ""))
    if mpi == "mpirun":
        return ["mpirun", "--bind-to", "none", *container]
    return ["srun", f"--mpi={mpi}", f"--job-name={_STEP}", "--kill-on-bad-exit=1", *container]


@contextlib.contextmanager
def _started(command: Sequence[str], scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Its output goes to a file; it does not outlive the block."""
    with (scratch / "output.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _signal(process: subprocess.Popen[bytes], mpi: str) -> None:
    """What Slurm does before the time limit: the signal goes to the tasks of the step."""
    if mpi == "mpirun":
        process.send_signal(signal.SIGUSR1)
        return
    job = os.environ["SLURM_JOB_ID"]
    steps = run_bounded(["squeue", "--noheader", "--steps", "--format=%i %j"], limit_s=ASK_LIMIT_S)
    named = [line.split() for line in steps.output.splitlines() if line.endswith(f" {_STEP}")]
    own = [step for step, _ in named if step.startswith(f"{job}.")]
    if not own:
        raise UserError(f"rehearse: squeue shows no step {_STEP} of job {job}: {steps.reason}", EXIT_CRASH)
    outcome = run_bounded(["scancel", "--signal=USR2", own[-1]], limit_s=ASK_LIMIT_S)
    if outcome.code != 0:
        raise UserError(f"rehearse: scancel --signal=USR2 {own[-1]}: {outcome.reason}", EXIT_CRASH)


def _wait(
    holds: Callable[[], bool], process: subprocess.Popen[bytes], *, limit_s: float, what: str, scratch: Path
) -> None:
    give_up = time.monotonic() + limit_s
    while not holds():
        if process.poll() is not None:
            raise _failed(f"the launcher ended with {process.returncode} before {what}", scratch)
        if time.monotonic() > give_up:
            raise _failed(f"no sign of {what} within {limit_s:.0f} s", scratch)
        time.sleep(_POLL_S)


def _wait_for_end(process: subprocess.Popen[bytes], *, limit_s: float, scratch: Path) -> None:
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise _failed(f"the ranks did not end within {limit_s:.0f} s", scratch) from None


def _step(scratch: Path) -> int:
    """The last one done."""
    path = scratch / METRICS_FILE
    rows = ledger.read_rows(path) if path.exists() else []
    return max((row["step"] for row in rows if row.get("kind") == "train"), default=0)


def _failed(what: str, scratch: Path) -> UserError:
    lines = (scratch / "output.log").read_text(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("srun:")]
    last = (errors or lines or ["no output"])[-1].strip()
    return UserError(f"rehearse: {what} ({last}); read {scratch / 'output.log'}", EXIT_CRASH)
