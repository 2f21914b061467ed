"""Files: atomic publication, exact positional reads, a bounded set of open descriptors."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, final

from hvdlm.config import EXIT_CRASH, EXIT_USAGE, UserError

TEMP_PREFIX = ".tmp-"
"""Unfinished files begin so; whatever carries it after a crash is rubbish and may be deleted."""


STAGED_NAME = re.compile(r"hvdlm-[0-9a-f]{16}")
"""Folders of copies that `data.stage` makes."""


RECORD_NAME = "preprocess.json"
"""What a data set was made from. Written before the shards, so a killed run is known as one."""


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends without an exception.

    The temporary file is fsynced, renamed, and its folder fsynced; on any exception it is removed.

    Raises:
        UserError: The file system refuses: full, over quota, read-only, broken.
    """
    temp = path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(6)}-{path.name}")
    try:
        yield temp
        fsync(temp)
        temp.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one durable step.

    Raises:
        UserError: The file system refuses: full, over quota, read-only, broken.
    """
    with publishing(path) as temp, temp.open("xb") as file:
        file.write(content)


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell of a file that the system refuses to write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cure = "free space or choose another folder" if full else "check the folder and the file system"
    return UserError(f"{path}: cannot be written: {error.strerror}; {cure}", EXIT_CRASH)


def write_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Write all bytes of `view` at byte `offset`; a short write goes on where it stopped."""
    while view.nbytes:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` (bytes) from byte `offset` of `fd`; a short read goes on where it stopped.

    Raises:
        UserError: The file ends too early, or the device reports an error.
    """
    try:
        count = os.preadv(fd, [view], offset)
        while count < view.nbytes:
            got = os.preadv(fd, [view[count:]], offset + count)
            if got == 0:
                raise damaged(
                    path, f"truncated: ends at byte {offset + count}, needed {offset + view.nbytes}"
                )
            count += got
    except OSError as error:
        refuse_read(path, error, f" at byte {offset}")


def check_file(folder: Path, name: str, file_bytes: int) -> None:
    """Check, without opening it, that `folder`/`name` is a regular file of the size the manifest gives.

    Raises:
        UserError: It is missing, no regular file, or of another size.
    """
    try:
        # A Path for each of ten thousand files would take longer than asking for them.
        status = os.stat(f"{folder}/{name}")  # noqa: PTH116
    except OSError as error:
        refuse_read(folder / name, error, "")
    if wrong := _fault(status, file_bytes):
        raise damaged(folder / name, wrong)


def open_checked(path: Path, file_bytes: int) -> int:
    """Open a file for reading and check it as `check_file`.

    Returns:
        A file descriptor that the caller closes.

    Raises:
        UserError: It is missing, unreadable, no regular file, or of another size.
    """
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refuse_read(path, error, "")
    try:
        if wrong := _fault(os.fstat(fd), file_bytes):
            raise damaged(path, wrong)
    except BaseException:
        os.close(fd)
        raise
    return fd


def cure(folder: Path) -> str:
    """What to do about a damaged data set, or a damaged copy of its shards on a node's own disk."""
    if STAGED_NAME.fullmatch(folder.name):
        return "start the run again, which looks over what is staged and copies anew what is bad"
    if not (folder / RECORD_NAME).exists():
        return "copy the file again, or import the data set again"
    return f"run python -m hvdlm.dataset repair {shlex.quote(str(folder))}, or copy the file again"


def damaged(path: Path, found: str) -> UserError:
    """What to tell of a file of a data set that is not as it was written; of a copy trying again helps."""
    staged = STAGED_NAME.fullmatch(path.parent.name)
    return UserError(f"{path}: {found}; {cure(path.parent)}", EXIT_CRASH if staged else EXIT_USAGE)


@final
class OpenFiles:
    """At most `limit` open descriptors of checked files, the one opened first closed first.

    In random order that misses as often as closing the least recently used, and costs a read nothing.
    For one thread only: closing a descriptor that another thread reads from would hand that
    thread the bytes of whatever file is opened next under the same number.

    Args:
        files: Folder, name and size in bytes of each file; files are then known by their index.
        limit: At least 1.

    Attributes:
        fds: What is open, by index.
    """

    def __init__(self, files: Sequence[tuple[Path, str, int]], *, limit: int) -> None:
        self._files, self._limit = files, limit
        self.fds: dict[int, int] = {}

    def get(self, index: int) -> int:
        """The descriptor of a file, opened and checked where it is not open.

        Raises:
            UserError: As `open_checked`.
        """
        fd = self.fds.get(index)
        if fd is None:
            if len(self.fds) >= self._limit:
                os.close(self.fds.pop(next(iter(self.fds))))
            folder, name, file_bytes = self._files[index]
            fd = self.fds[index] = open_checked(folder / name, file_bytes)
        return fd

    def close(self) -> None:
        """Close every descriptor."""
        while self.fds:
            os.close(self.fds.popitem()[1])


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fault(status: os.stat_result, file_bytes: int) -> str:
    """What is wrong with a file, empty where nothing is."""
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size != file_bytes:
        return f"has {status.st_size} bytes, the manifest says {file_bytes}: truncated or changed"
    return ""


def refuse_read(path: Path, error: OSError, place: str) -> NoReturn:
    """Name the file, and the place in it, that the system could not read.

    Raises:
        UserError: Always.
    """
    if isinstance(error, FileNotFoundError):
        raise damaged(path, "missing, but the manifest names it") from error
    message = f"{path}: cannot be read{place}: {error.strerror} (errno {error.errno}); check the file system"
    raise UserError(message, EXIT_CRASH) from error
