"""A rank's pieces as they were at one moment, laid out in memory as in the file they go to."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, final

import torch
import xxhash

from hvdlm.data.files import write_exactly
from hvdlm.parallel.strategy import Piece

_CHUNK_BYTES = 2**22
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
    it is pinned.

    Source: github.com/huggingface/safetensors, "Format": eight bytes of length, little-endian, a header
    in JSON, and the tensors' bytes without a gap.

    Args:
        file: name of this rank's file.

    Attributes:
        file: its name.
        records: of each piece, for the manifest: `name`, `dtype`, `global_shape`, and as `piece` where
            it lies.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.records: list[dict[str, Any]] = []
        self._header = b""
        self._values = torch.empty(0, dtype=torch.uint8)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self._header) + self._values.numel()

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
        on_gpu = any(piece.values.is_cuda for piece in ordered)
        if self._values.numel() != size_bytes or self._values.is_pinned() != on_gpu:
            self._values = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        for piece, end in zip(ordered, ends, strict=True):
            source = piece.values.detach()
            copy = self._values[end - source.nbytes : end].view(source.dtype).view(source.shape)
            copy.copy_(source, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        self._header = _header(ordered, [record["piece"]["key"] for record in self.records], ends)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write and fsync the file; needs no lock of Python's interpreter for long.

        Returns:
            Its `bytes`, and `xxh3_128` of what was to be written.

        Raises:
            OSError: the file system refuses; nothing of the file is left then.
        """
        if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < self.file_bytes:
            # Else what else the run writes would find the disk full before this one gives up.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_durably(folder / self.file, [self._header, self._values.numpy().data])

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


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Create a file, write it to its end, and fsync it.

    Returns:
        Its `bytes` and `xxh3_128`.

    Raises:
        OSError: the file system refuses; the file is gone then.
    """
    digest, offset = xxhash.xxh3_128(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            for start in range(0, len(part), _CHUNK_BYTES):
                chunk = memoryview(part)[start : start + _CHUNK_BYTES]
                write_exactly(fd, chunk, offset)
                digest.update(chunk)
                offset += chunk.nbytes
        os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return {"bytes": offset, "xxh3_128": digest.hexdigest()}


def _header(pieces: list[Piece], keys: list[str], ends: list[int]) -> bytes:
    """What stands before the tensors' bytes; they begin at a multiple of eight."""
    entries = {
        key: {
            "dtype": _DTYPES[piece.values.dtype],
            "shape": list(piece.values.shape),
            "data_offsets": [end - prod(piece.values.shape) * piece.values.element_size(), end],
        }
        for piece, key, end in zip(pieces, keys, ends, strict=True)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
