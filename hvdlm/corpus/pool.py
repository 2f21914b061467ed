"""The workers of one process: spawned, fed one task at a time, never waited for when they are dead.

Not concurrent.futures: it cannot say which worker died of what, nor stop one in the middle of a
task. Spawned, because MPI and its network do not survive a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, final

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.corpus.job import Job, Report, Tally
from hvdlm.corpus.work import Work

Step = Callable[[int, Job, Report], dict[str, Any]]
"""Does task `index` of a stage: (index, job, report) -> its result."""

_OF_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = (0.05, 2.0)
_PATIENCE_S = 0.5


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    index: int | None = None


@final
class Team:
    """The workers of this process; a context manager, because they must not outlive it.

    Args:
        work: where tasks are claimed and results kept.
        job: common to all tasks.
        workers: processes; with 1 this process works itself.
        report: called with what was newly counted.
    """

    def __init__(self, work: Work, job: Job, *, workers: int, report: Report) -> None:
        self._work, self._job, self._report = work, job, report
        self._size = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def run(self, stage: str, step: Step, count: int) -> None:
        """Help with a stage until all its tasks are done, by whomever.

        Args:
            stage: its name.
            step: a function of a module, as workers import it.
            count: tasks it has.

        Raises:
            UserError: the first that a worker met, a worker that was killed, or a `Work.check`.
            GoneError: the data set is complete.
        """
        patience_s = _POLL_S[0]
        while True:
            self._work.check()
            if self._advance(stage, step, count):
                patience_s = _POLL_S[0]
            elif self._work.complete(stage, count):
                return
            else:
                time.sleep(patience_s)
                patience_s = min(1.5 * patience_s, _POLL_S[1])

    def _advance(self, stage: str, step: Step, count: int) -> bool:
        """Hand out, and wait a little for results; False where there was nothing to do."""
        if self._size <= 1:
            index = self._work.claim(stage, count)
            if index is not None:
                with one_thread():
                    self._finish(stage, index, step(index, self._job, self._report))
            return index is not None
        self._hand_out(stage, step, count)
        busy = {worker.pipe: worker for worker in self._workers if worker.index is not None}
        for pipe in wait(list(busy), timeout=_PATIENCE_S) if busy else ():
            self._hear(busy[pipe], stage)  # type: ignore[index]
        return bool(busy)

    def _finish(self, stage: str, index: int, result: dict[str, Any]) -> None:
        self._work.finish(stage, index, result)
        self._report(Tally(tasks=1))

    def _hand_out(self, stage: str, step: Step, count: int) -> None:
        for worker in self._idle():
            index = self._work.claim(stage, count)
            if index is None:
                return
            if worker is None:
                worker = self._new_worker()
            try:
                worker.pipe.send((step, index))
                worker.index = index
            except OSError:
                raise _death(worker) from None

    def _idle(self) -> Iterator[_Worker | None]:
        """Workers without a task; None where one may be started."""
        yield from [worker for worker in self._workers if worker.index is None]
        while len(self._workers) < self._size:
            yield None

    def _new_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, replace(self._job)), daemon=True)
        # A signal to the whole group waits until the worker can leave it to its parent. Starting the tracker
        # lets some of them through again (bpo-33613), so it comes first.
        with _blocked():
            resource_tracker.ensure_running()
        with _blocked():
            process.start()
            self._workers.append(_Worker(process, ours))
        # Else this end stays open here, and the death of the worker goes unnoticed.
        theirs.close()
        return self._workers[-1]

    def _hear(self, worker: _Worker, stage: str) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            raise _death(worker) from None
        if isinstance(message, Tally):
            self._report(message)
        elif isinstance(message, dict):
            assert worker.index is not None
            self._finish(stage, worker.index, message)
            worker.index = None
        elif isinstance(message, UserError):
            raise message
        else:
            raise RuntimeError(f"a worker failed; its traceback:\n{message}")


def _death(worker: _Worker) -> UserError:
    worker.process.join(timeout=10)
    code = worker.process.exitcode or 0
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    cure = "run again"
    if code == -signal.SIGKILL:
        cure = "if memory ran out (dmesg or sacct tell), run again with fewer --workers"
    return UserError(f"a worker process died of {cause} in its task {worker.index}; {cure}", EXIT_CRASH)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait, here and in a process that is started here, which inherits the mask.

    An interrupt that the system gave to another thread waits as well: Python would raise it in this one,
    in the middle of a start, and the worker would find half of what it is to do.
    """
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if interrupts and callable(handler):
            handler(signal.SIGINT, None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
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


def _serve(pipe: Connection, job: Job) -> None:
    """A worker's life: tasks in, counts and results out."""
    # Slurm signals every process of a step, and one Ctrl-C reaches the whole group; the parent decides.
    for number in _OF_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_PARENT)
    # A closed pipe means that the parent is gone.
    with one_thread(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            while True:
                step, index = pipe.recv()
                pipe.send(step(index, job, pipe.send))
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
