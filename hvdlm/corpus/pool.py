"""Worker processes: spawned, fed one task at a time, never waited for when they are dead.

Not concurrent.futures: it cannot say which worker died of what, nor stop one in the middle of a task.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus.encode import Job, TaskResult, encode_task
from hvdlm.corpus.plan import Task
from hvdlm.text import tokenizer


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    task: Task | None = None


def run_tasks(
    tasks: Sequence[Task], job: Job, *, workers: int, report: Callable[[int], None]
) -> list[TaskResult]:
    """Encode all tasks; with one worker in this process.

    Args:
        tasks: the plan.
        job: common to all.
        workers: processes at most.
        report: called with newly read bytes.

    Returns:
        Results in the order of the plan.

    Raises:
        UserError: the first that a worker met, or a worker that was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        with _one_thread():
            encoder = _load(job)
            return [encode_task(task, job, encoder, report) for task in tasks]
    context = multiprocessing.get_context("spawn")
    team: list[_Worker] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            # Else this end stays open here, and the death of the worker goes unnoticed.
            theirs.close()
            team.append(_Worker(process, ours))
        return _hand_out(tasks, team, report)
    finally:
        for worker in team:
            worker.process.kill()
        for worker in team:
            worker.process.join()
            worker.pipe.close()


def _hand_out(tasks: Sequence[Task], team: list[_Worker], report: Callable[[int], None]) -> list[TaskResult]:
    # The largest first, so that no worker is left alone with one at the end.
    waiting = sorted(tasks, key=lambda task: task.size_bytes)
    results: list[TaskResult] = []
    for worker in team:
        _give(worker, waiting)
    while len(results) < len(tasks):
        pipes = {worker.pipe: worker for worker in team if worker.task}
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                raise _death(worker) from None
            if isinstance(message, int):
                report(message)
            elif isinstance(message, TaskResult):
                results.append(message)
                _give(worker, waiting)
            elif isinstance(message, UserError):
                raise message
            else:
                raise RuntimeError(f"a worker failed; its traceback:\n{message}")
    return sorted(results, key=lambda result: result.index)


def _give(worker: _Worker, waiting: list[Task]) -> None:
    worker.task = waiting.pop() if waiting else None
    if worker.task:
        try:
            worker.pipe.send(worker.task)
        except OSError:
            raise _death(worker) from None


def _death(worker: _Worker) -> UserError:
    worker.process.join(timeout=10)
    code = worker.process.exitcode or 0
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    path = worker.task.pieces[0].path if worker.task else "nothing yet"
    cure = "run again"
    if code == -signal.SIGKILL:
        cure = "if memory ran out (dmesg or sacct tell), run again with fewer --workers"
    return UserError(f"a worker process died of {cause} while it read {path}; {cure}", EXIT_CRASH)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizer to one thread: processes are the parallelism. It looks at every call."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load(job: Job) -> tokenizer.Tokenizer:
    return tokenizer.load(job.folder / job.tokenizer.file, eos=job.eos)


def _serve(pipe: Connection, job: Job) -> None:
    """A worker's life: tasks in, byte counts and results out."""
    # One Ctrl-C reaches the whole group; the parent decides, and kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A closed pipe means that the parent is gone.
    with _one_thread(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            encoder = _load(job)
            while True:
                pipe.send(encode_task(pipe.recv(), job, encoder, pipe.send))
        except UserError as error:
            pipe.send(error)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except MemoryError:
            pipe.send(
                UserError("a worker process ran out of memory; run again with fewer --workers", EXIT_CRASH)
            )
        except Exception:
            pipe.send(traceback.format_exc())
