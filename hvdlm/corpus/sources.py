"""Which files are the input: files, globs and folders, in one order that depends on nothing else."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import xxhash

from hvdlm.config import EXIT_CRASH, UserError

KINDS = {
    ".txt": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
}
"""What a file is read as, by the end of its name."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read: its absolute path, a value of `KINDS`, size in bytes, time of last change in ns."""

    path: str
    kind: str
    size_bytes: int
    changed_ns: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Find the files that the user named.

    A file that is named itself must be readable as input; in folders (searched through, links to folders
    followed, hidden ones left out) and globs other files are passed over, and so are empty ones.

    Args:
        inputs: files, folders, or globs (`**` included).

    Returns:
        Each file once, sorted by absolute path.

    Raises:
        UserError: an input that does not exist, is empty, has an unknown suffix or holds no input
            at all, or a folder that cannot be read (a glob passes over it).
    """
    found: dict[str, InputFile] = {}
    for text in inputs:
        try:
            files = _expand(text)
        except OSError as error:
            _refuse(text, error)
        for file in files:
            found.setdefault(file.path, file)
    return [found[path] for path in sorted(found)]


def kind_of(path: str | Path) -> str | None:
    """The value of `KINDS` for a file name, or None."""
    name = Path(path).name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def describe(path: str | Path) -> InputFile:
    """Look one file up.

    Raises:
        UserError: it cannot be looked up, is not a regular file, or has an unknown suffix.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        _refuse(path, error)
    kind = kind_of(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: found a device or a pipe, needed a file; save its content to a file first")
    if kind is None:
        raise UserError(f"{path}: unknown kind of file; needed {' '.join(KINDS)}; convert or rename it")
    return InputFile(os.path.realpath(path), kind, status.st_size, status.st_mtime_ns)


def digest(files: Iterable[InputFile]) -> str:
    """What identifies a list of inputs without reading them: xxh3_128 of paths, sizes and times, in hex."""
    state = xxhash.xxh3_128()
    for file in files:
        state.update(f"{file.path}\0{file.size_bytes}\0{file.changed_ns}\0".encode(errors="surrogateescape"))
    return state.hexdigest()


def _expand(text: str) -> list[InputFile]:
    path = Path(text)
    if path.is_dir():
        files = [describe(name) for name in _walk(path) if kind_of(name)]
    elif path.exists() or not glob.has_magic(text):
        file = describe(path)
        if file.size_bytes == 0:
            raise UserError(f"{text}: empty file; leave it out or put text into it")
        return [file]
    else:
        # Path.glob takes no absolute pattern.
        matches = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
        names = [name for match in matches for name in (_walk(match) if match.is_dir() else [match])]
        files = [describe(name) for name in names if kind_of(name)]
    files = [file for file in files if file.size_bytes]
    if not files:
        raise UserError(f"{text}: holds no input; needed non-empty files of {' '.join(KINDS)}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        _refuse(error.filename, error)

    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _refuse(path: str | Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise UserError(f"{path}: not found; check the path, or put quotes around a pattern") from None
    if isinstance(error, PermissionError):
        raise UserError(f"{path}: permission denied; ask its owner, or leave it out") from None
    if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP):
        raise UserError(f"{path}: {error.strerror}; check the path") from None
    raise UserError(f"{path}: {error.strerror}; check the file system", EXIT_CRASH) from None
