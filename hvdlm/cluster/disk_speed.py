"""How fast a folder takes a large file."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

_BLOCK_BYTES = 8 << 20
_LEAST_S = 2.0


def write_speed(folder: Path, *, most_bytes: int = 2 << 30) -> float:
    """Bytes a second of one writer, fsync included; the file is removed.

    Args:
        folder: where to.
        most_bytes: so much is written at most; less where it takes two seconds.

    Raises:
        OSError: the file system refuses.
    """
    # Random, as some file systems compress.
    block = secrets.token_bytes(_BLOCK_BYTES)
    path = folder / f".tmp-speed-{secrets.token_hex(4)}"
    written, begin = 0, time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < most_bytes and time.perf_counter() - begin < _LEAST_S:
                written += file.write(block)
                # Else it is memory's speed.
                os.fdatasync(file.fileno())
            os.fsync(file.fileno())
        return written / (time.perf_counter() - begin)
    finally:
        path.unlink(missing_ok=True)
