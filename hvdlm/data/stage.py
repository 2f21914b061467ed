"""Copies of shards on a node's own disk: each is compared with its digest while it is copied.

STAGE/hvdlm-FINGERPRINT/     the first 16 digits of the data set's fingerprint
    train-00000.h5
    .tmp-RANDOM-train-00001.h5      being copied, and locked as long as its writer lives
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hvdlm.config import UserError
from hvdlm.data.entries import ShardEntry
from hvdlm.data.extents import read_pieces
from hvdlm.data.files import TEMP_PREFIX, cure, open_checked, publishing, unwritable, write_exactly
from hvdlm.data.manifest import Manifest

_PIECE_BYTES = 8 << 20  # What a parallel file system is asked for at a time.
_GIB = 1 << 30


@dataclass(frozen=True)
class Copy:
    """A shard, the folder it lies in, and the folder on this node's disk that it is copied to."""

    entry: ShardEntry
    folder: Path
    to: Path

    @property
    def source(self) -> Path:
        """What is copied."""
        return self.folder / self.entry.name

    @property
    def path(self) -> Path:
        """The copy."""
        return self.to / self.entry.name


@dataclass(frozen=True)
class Staged:
    """What was done: shards that are there now, their bytes, and how many of them an earlier start
    had copied."""

    files: int = 0
    bytes: int = 0
    reused: int = 0

    def __add__(self, other: Staged) -> Staged:
        return Staged(self.files + other.files, self.bytes + other.bytes, self.reused + other.reused)

    def summary(self, seconds: float) -> str:
        """For people."""
        gib = self.bytes / _GIB
        speed = f"{gib:.2f} GiB in {seconds:.1f} s ({gib / max(seconds, 1e-3):.2f} GiB/s)"
        return f"{self.files} shard(s), {speed}, {self.reused} of them reused"


def stage_folder(stage: str, manifest: Manifest, env: Mapping[str, str]) -> Path:
    """Where this node keeps copies of a data set's shards.

    Args:
        stage: `data.stage`, with variables of the environment in it.
        manifest: Of the data set.
        env: The environment of this process.

    Raises:
        UserError: A variable in it is not set, or empty.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not env.get(name):
            raise UserError(
                f"data.stage {stage}: the variable {name} is not set on this node ({os.uname().nodename}); "
                "set it there, or name a folder on the node's local disk"
            )
        return env[name]

    folder = Path(re.sub(r"\$(?:(\w+)|\{([^}]*)\})", value, stage)).expanduser()
    return folder / f"hvdlm-{manifest.fingerprint[:16]}"


def prepare_stage(copies: Sequence[Copy]) -> None:
    """Make the folders, remove what a killed copy left there, and see that the shards fit; for one process.

    Args:
        copies: What all processes of this node will copy, to folders from `stage_folder`.

    Raises:
        UserError: A folder cannot be written, or there is too little space.
    """
    for to in dict.fromkeys(copy.to for copy in copies):
        _prepare_folder(to)
    missing = [copy.entry.file_bytes for copy in copies if not _has_size(copy)]
    if not missing:
        return
    stage = copies[0].to.parent
    status = os.statvfs(stage)
    needed, free = sum(missing), status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"data.stage {stage}: {free >> 20:,} MiB are free on {os.uname().nodename}, the "
            f"{len(missing)} shard(s) to copy need {(needed >> 20) + 1:,} MiB; free space there, name a "
            "larger disk, or leave data.stage empty"
        )


def stage_shards(copies: Sequence[Copy], *, share: tuple[int, int], stop: threading.Event) -> Staged | None:
    """Copy one share of the shards, or find them copied and intact.

    Every byte is digested, whether copied now or earlier: what lies there afterwards needs no other
    verification. A copy appears under its name by a rename, when it is whole and durable.

    Args:
        copies: In the same order for all shares, to folders that `prepare_stage` has seen to.
        share: (index, parts): file i belongs to index i % parts.
        stop: Ends it early; nothing unfinished is left.

    Returns:
        What was done; None where it was stopped.

    Raises:
        UserError: A shard is missing, unreadable or damaged, or its copy cannot be written.
    """
    done = Staged()
    try:
        for copy in copies[share[0] :: share[1]]:
            reused = _is_intact(copy.path, copy.entry, stop)
            if not reused:
                _copy(copy.source, copy.entry, copy.path, stop)
            done += Staged(1, copy.entry.file_bytes, int(reused))
    except _StoppedError:
        return None
    return done


class _StoppedError(Exception):
    """Asked to stop, in the middle of a file."""


def _prepare_folder(to: Path) -> None:
    try:
        to.mkdir(parents=True, exist_ok=True)
        for temp in to.glob(f"{TEMP_PREFIX}*"):
            _remove_abandoned(temp)
        probe = to / f"{TEMP_PREFIX}{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # Another run on this node may have tidied up.
    except OSError as error:
        raise UserError(
            f"data.stage {to.parent}: {to} cannot be written: {error.strerror}; name a folder of your own on "
            "the node's local disk"
        ) from error


def _has_size(copy: Copy) -> bool:
    try:
        return copy.path.stat().st_size == copy.entry.file_bytes
    except FileNotFoundError:
        return False


def _remove_abandoned(temp: Path) -> None:
    """Remove an unfinished copy unless somebody is at it: another run on this node, say."""
    try:
        with temp.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temp.unlink()
    except (BlockingIOError, FileNotFoundError):
        return


def _is_intact(path: Path, entry: ShardEntry, stop: threading.Event) -> bool:
    """Whether an earlier copy is as it should be; one that is not is removed, to give its space back."""
    try:
        fd = open_checked(path, entry.file_bytes)
    except UserError:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        return False
    digest = xxhash.xxh3_128()
    try:
        for piece in _pieces(fd, path, entry, stop):
            digest.update(piece)
    finally:
        os.close(fd)
    intact = digest.hexdigest() == entry.xxh3_128
    if not intact:
        path.unlink()
    return intact


def _copy(source: Path, entry: ShardEntry, path: Path, stop: threading.Event) -> None:
    fd, digest, place = open_checked(source, entry.file_bytes), xxhash.xxh3_128(), 0
    try:
        with publishing(path) as temp, temp.open("xb", buffering=0) as copy:
            fcntl.flock(copy, fcntl.LOCK_EX)
            for piece in _pieces(fd, source, entry, stop):
                digest.update(piece)
                write_exactly(copy.fileno(), piece, place)
                place += piece.nbytes
            if digest.hexdigest() != entry.xxh3_128:
                raise UserError(f"{source}: does not have the digest in the manifest; {cure(source.parent)}")
            # Here too, because the lock ends with the file and this takes long.
            os.fsync(copy.fileno())
    finally:
        os.close(fd)


def _pieces(fd: int, path: Path, entry: ShardEntry, stop: threading.Event) -> Iterator[memoryview]:
    for piece in read_pieces(fd, path, first=0, end=entry.file_bytes, piece_bytes=_PIECE_BYTES):
        if stop.is_set():
            raise _StoppedError
        yield piece
