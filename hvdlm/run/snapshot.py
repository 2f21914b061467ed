"""A rank's pieces as they were at one moment, laid out in memory as in the file they go to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, final

import torch
import xxhash

from hvdlm.data.files import write_exactly
from hvdlm.parallel.strategy import Piece

_CHUNK_BYTES = 2**22
_PAGE_BYTES = 4096
_DIRECT_BYTES = 2**22
_LENGTH_BYTES = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@final
class Snapshot:
    """Copies of this rank's pieces, and the safetensors file that holds them.

    The memory is kept from save to save: fresh pages cost as much as the copy. With pieces on a GPU
    it is pinned, for as long as the snapshot lives. A large file is laid out in whole pages, so that its
    memory can go to the disk past the kernel's cache of files.

    Source: github.com/huggingface/safetensors, "Format": eight bytes of length, little-endian, a header
    in JSON, and the tensors' bytes without a gap.

    Args:
        file: name of this rank's file.

    Attributes:
        file: its name.
        records: of each piece, for the manifest: `name`, `dtype`, `global_shape`, and as `piece` where
            it lies.
        file_bytes: size of the file.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []
        self.file_bytes = 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], object] = bool

    def take(self, pieces: Iterable[Piece]) -> None:
        """Copy the pieces, whatever happens to them later.

        Args:
            pieces: on any device.
        """
        # Wide numbers first, so that each begins at a multiple of its size.
        ordered = sorted(pieces, key=lambda p: (-p.values.element_size(), p.name, p.offset))
        self.records = [self._record(piece) for piece in ordered]
        ends, size_bytes = [], 0
        for piece in ordered:
            size_bytes += piece.values.nbytes
            ends.append(size_bytes)
        align = _PAGE_BYTES if size_bytes >= _DIRECT_BYTES else 8
        header = _header(ordered, [record["piece"]["key"] for record in self.records], ends, align=align)
        self.file_bytes = len(header) + size_bytes
        on_gpu = any(piece.values.is_cuda for piece in ordered)
        memory_bytes = -(-self.file_bytes // align) * align
        if self._memory.numel() != memory_bytes or self._memory.is_pinned() != on_gpu:
            self._unpin()
            self._memory = _pages(memory_bytes)
            if on_gpu:
                self._unpin = _pin(self._memory, owner=self)
        self._memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        values = self._memory[len(header) :]
        for piece, end in zip(ordered, ends, strict=True):
            source = piece.values.detach()
            copy = values[end - source.nbytes : end].view(source.dtype).view(source.shape)
            copy.copy_(source, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()

    def write(self, folder: Path, *, cancelled: Callable[[], bool] = bool) -> dict[str, Any]:
        """Write and fsync the file; needs no lock of Python's interpreter for long.

        Args:
            folder: where to.
            cancelled: asked in between: whether to give up.

        Returns:
            Its `bytes`, and `xxh3_128` of what was to be written.

        Raises:
            OSError: the file system refuses, or ECANCELED; nothing of the file is left then.
        """
        if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < self.file_bytes:
            # Else what else the run writes would find the disk full before this one gives up.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        memory = self._memory.numpy().data
        return write_durably(folder / self.file, memory, self.file_bytes, cancelled=cancelled)

    def _record(self, piece: Piece) -> dict[str, Any]:
        shape = tuple(piece.values.shape)
        place = f"@{','.join(map(str, piece.offset))}" if shape != piece.global_shape else ""
        return {
            "name": piece.name,
            "dtype": str(piece.values.dtype).removeprefix("torch."),
            "global_shape": piece.global_shape,
            "piece": {
                "file": self.file,
                "key": f"{piece.name}{place}",
                "offset": piece.offset,
                "shape": shape,
            },
        }


def write_durably(
    path: Path, memory: bytes | memoryview, size_bytes: int, *, cancelled: Callable[[], bool] = bool
) -> dict[str, Any]:
    """Create a file, write it to its end, and fsync it.

    A large one goes past the kernel's cache of files, where the file system can do so: filling the cache
    takes a core for a second a GB, which others compute with.

    Source: open(2), O_DIRECT: memory, offset and length are to be multiples of a block.

    Args:
        path: must not exist.
        memory: begins with what is to be written; where that is large, whole pages.
        size_bytes: of the file.
        cancelled: asked in between: whether to give up.

    Returns:
        Its `bytes` and `xxh3_128`.

    Raises:
        OSError: the file system refuses, or ECANCELED; the file is gone then.
    """
    digest, view = xxhash.xxh3_128(), memoryview(memory)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if size_bytes >= _DIRECT_BYTES:
            _set_direct(fd, os.O_DIRECT)
        for start in range(0, len(view), _CHUNK_BYTES):
            if cancelled():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            chunk = view[start : start + _CHUNK_BYTES]
            _write(fd, chunk, start)
            digest.update(chunk[: max(0, size_bytes - start)])
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return {"bytes": size_bytes, "xxh3_128": digest.hexdigest()}


def _write(fd: int, chunk: memoryview, offset: int) -> None:
    try:
        write_exactly(fd, chunk, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system that takes the flag and then not the write, or wrote a part of a block.
        _set_direct(fd, 0)
        write_exactly(fd, chunk, offset)


def _set_direct(fd: int, flag: int) -> None:
    # EINVAL where the file system cannot do it: then the cache is filled.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, flag)


def _pages(size_bytes: int) -> torch.Tensor:
    """Memory that begins with a page, uint8 [size_bytes]."""
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)


def _pin(memory: torch.Tensor, *, owner: object) -> Callable[[], object]:
    """Have a GPU copy into the memory by itself.

    Not torch's `pin_memory`: it takes the next power of two, of a model's state up to twice as much.

    Args:
        memory: not yet pinned.
        owner: without it the memory is pinned no longer.

    Returns:
        Ends it, before the memory goes.
    """
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    unpin = weakref.finalize(owner, _unpin, memory)
    unpin.atexit = False
    return unpin


def _unpin(memory: torch.Tensor) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def _header(pieces: list[Piece], keys: list[str], ends: list[int], *, align: int) -> bytes:
    """What stands before the tensors' bytes; its length is a multiple of `align`."""
    entries = {
        key: {
            "dtype": _DTYPES[piece.values.dtype],
            "shape": list(piece.values.shape),
            "data_offsets": [end - prod(piece.values.shape) * piece.values.element_size(), end],
        }
        for piece, key, end in zip(pieces, keys, ends, strict=True)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % align)
    return struct.pack("<Q", len(text)) + text
