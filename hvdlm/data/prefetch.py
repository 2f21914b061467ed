"""Items made ahead by threads, delivered in order. Threads, because MPI does not survive a fork."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, final

Item = TypeVar("Item")


@final
class Prefetcher(Generic[Item]):
    """An infinite sequence whose item k is made by thread k % `threads`.

    Args:
        make: `make(k)` returns thread k's iterator over items k, k + threads, k + 2 threads, …, and
            runs in that thread from its first step to its last.
        threads: How many.
        depth: Items kept ready; each thread may hold one more in its hands.
    """

    def __init__(self, make: Callable[[int], Iterator[Item]], *, threads: int, depth: int) -> None:
        self._stop = threading.Event()
        self._next = 0
        self._queues: list[queue.Queue[Item | _Failure]] = [
            queue.Queue(max(1, depth // threads)) for _ in range(threads)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(make, k), name=f"prefetch-{k}", daemon=True)
            for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        """The next item; an exception of its thread is raised here, with that thread's traceback."""
        if self._stop.is_set():
            raise StopIteration
        item = self._queues[self._next].get()
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        self._next = (self._next + 1) % len(self._queues)
        return item

    def close(self) -> None:
        """Stop the threads and wait for them; a thread that hangs in a read is left behind after 5 s."""
        self._stop.set()
        for items, thread in zip(self._queues, self._threads, strict=True):
            # A full queue blocks its thread: make room until it has seen the flag.
            for _ in range(500):
                while not items.empty():
                    items.get_nowait()
                thread.join(timeout=0.01)
                if not thread.is_alive():
                    break

    def _run(self, make: Callable[[int], Iterator[Item]], index: int) -> None:
        items = make(index)
        try:
            while not self._stop.is_set():
                self._queues[index].put(next(items))
        except BaseException as error:
            self._queues[index].put(_Failure(error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()


@final
class _Failure:
    """What a thread leaves in place of the item it could not make."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
