"""Saving while the run goes on: a snapshot at once, the writing in a thread, the commit at a later step."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_CRASH
from hvdlm.parallel.strategy import Piece
from hvdlm.run import checkpoint
from hvdlm.run.snapshot import Snapshot, write_durably


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    Attributes:
        step: whose state it holds.
        state: what is in its state.json.
        asked: somebody asked for it.
        seconds: `snapshot_s`, `write_s` and `stall_s`, the slowest rank's of each: how long the run stood
            for the copy, how long the writing took, how long the run waited for it; and `commit_s`.
        size_bytes: of the files of all ranks.
    """

    step: int
    state: dict[str, Any]
    asked: bool
    seconds: dict[str, float]
    size_bytes: int


@final
class Saver:
    """Writes checkpoints, one at a time.

    `begin` copies this rank's pieces and starts a thread that writes them; `finish` waits for it, and
    rank 0 commits what all have written. The thread takes no part in collectives: that every rank has
    written is known from the step's statistics, in which `writing` rides along. Whatever fails before
    the commit leaves older checkpoints as they were.

    Args:
        folder: the run's `checkpoints` folder.
        world: the ranks that save together.
        files: small files to carry, by name.
    """

    def __init__(self, folder: Path, world: World, *, files: dict[str, bytes]) -> None:
        self._folder = folder
        self._world = world
        self._files = files
        self._snapshot = Snapshot(f"rank-{world.rank:05d}.safetensors")
        self._save: _Save | None = None
        self._deleting: threading.Thread | None = None

    @property
    def in_flight(self) -> bool:
        """A save has begun and is not committed; equal on all ranks."""
        return self._save is not None

    @property
    def writing(self) -> bool:
        """This rank has not written its part yet."""
        return self._save is not None and self._save.thread.is_alive()

    def begin(
        self,
        pieces: Iterable[Piece],
        state: dict[str, Any],
        *,
        asked: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Copy the training state and begin to write it; no other save may be in flight.

        Args:
            pieces: this rank's part of the state; may change as soon as this returns.
            state: what is not a tensor; needs `step` and `attempt`.
            asked: whether somebody asked for it.
            before: called on rank 0 before anything on the disk is touched.

        Raises:
            AgreedError: the folder cannot be created, or `before` raised; on all ranks.

        Collective: yes.
        """
        if self._save:
            raise RuntimeError("a save is in flight: finish it first")
        self.close()
        temp = checkpoint.temp_folder(self._folder, state["step"], state["attempt"])

        def open_folder() -> None:
            if before:
                before()
            checkpoint.make_empty(temp)

        self._world.on_root(open_folder, name="save.open")
        began_s = time.perf_counter()
        self._snapshot.take(pieces)
        snapshot_s = time.perf_counter() - began_s
        # Now: the caller goes on changing what its state refers to.
        state = json.loads(json.dumps(state))
        small = self._small_files(state) if self._world.is_root else {}
        self._save = _Save(self._snapshot, temp, small, state=state, asked=asked, snapshot_s=snapshot_s)

    def finish(self, *, before: Callable[[], None] | None = None) -> Saved | None:
        """Wait until every rank has written, and commit.

        Args:
            before: called on rank 0 when all is written, before it is committed.

        Returns:
            What was committed; None where no save was in flight.

        Raises:
            AgreedError: some rank could not write (a full disk, say), or `before` raised; on all ranks.

        Collective: yes.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        own = save.wait()
        began_s = time.perf_counter()
        try:
            written = self._world.gather_json(own, name="save.written")
            for rank, outcome in enumerate(written):
                if "error" in outcome:
                    raise AgreedError(f"rank {rank}: {outcome['error']}", EXIT_CRASH)
            self._world.on_root(lambda: self._commit(save, written, before), name="save.commit")
        except AgreedError:
            if self._world.is_root:
                # Half a checkpoint would keep a full disk full.
                shutil.rmtree(save.temp, ignore_errors=True)
            raise
        seconds = {key: max(w[key] for w in written) for key in ("snapshot_s", "write_s", "stall_s")}
        seconds["commit_s"] = time.perf_counter() - began_s
        size_bytes = sum(digest["bytes"] for w in written for digest in w["files"].values())
        return Saved(save.state["step"], save.state, save.asked, seconds, size_bytes)

    def abandon(self) -> None:
        """Give up a save that is in flight; what it has written is left to `checkpoint.delete_unfinished`.

        Collective: no.
        """
        save, self._save = self._save, None
        if save:
            save.cancel()

    def delete(self, folders: list[Path]) -> None:
        """Delete folders in a thread: a file system takes a quarter of a second a GB and more."""
        self.close()
        self._deleting = threading.Thread(target=_delete, args=(folders,), name="delete", daemon=True)
        self._deleting.start()

    def close(self) -> None:
        """Wait until what was to be deleted is gone."""
        if self._deleting:
            self._deleting.join()

    def _commit(self, save: _Save, written: list[dict[str, Any]], before: Callable[[], None] | None) -> None:
        if before:
            before()
        checkpoint.commit(save.temp, checkpoint.step_folder(self._folder, save.state["step"]), written)

    def _small_files(self, state: dict[str, Any]) -> dict[str, bytes]:
        return {**self._files, "state.json": (json.dumps(state, indent=1) + "\n").encode()}


@final
class _Save:
    """One rank's part of a save, from the snapshot to its files on the disk."""

    def __init__(
        self,
        snapshot: Snapshot,
        temp: Path,
        small: dict[str, bytes],
        *,
        state: dict[str, Any],
        asked: bool,
        snapshot_s: float,
    ) -> None:
        self.temp = temp
        self.state = state
        self.asked = asked
        self._snapshot = snapshot
        self._small = small
        self._snapshot_s = snapshot_s
        self._outcome: dict[str, Any] = {}
        self._failure: BaseException | None = None
        self._cancelled = threading.Event()
        self.thread = threading.Thread(target=self._run, name="save", daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        """Write no more, and wait until the thread has heard of it."""
        self._cancelled.set()
        self.thread.join()

    def wait(self) -> dict[str, Any]:
        """What was written, or the `error` that the file system gave.

        Raises:
            BaseException: whatever else ended the thread.
        """
        began_s = time.perf_counter()
        self.thread.join()
        if self._failure:
            raise self._failure
        return self._outcome | {"stall_s": time.perf_counter() - began_s, "snapshot_s": self._snapshot_s}

    def _run(self) -> None:
        began_s = time.perf_counter()
        try:
            self._outcome = {"pieces": self._snapshot.records, "files": self._write()}
        except OSError as error:
            path = self.temp / self._snapshot.file
            self._outcome = {
                "error": f"{path}: cannot be written: {error.strerror}; free space in the run folder"
            }
        except BaseException as error:
            # For the main thread, which ends the job with it.
            self._failure = error
        self._outcome["write_s"] = time.perf_counter() - began_s

    def _write(self) -> dict[str, Any]:
        """The digests of this rank's files."""
        files = {
            name: write_durably(self.temp / name, content, len(content))
            for name, content in self._small.items()
        }
        if self._snapshot.records:
            files[self._snapshot.file] = self._snapshot.write(self.temp, cancelled=self._cancelled.is_set)
        return files


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
