"""nanoGPT's token files: nothing but little-endian uint16 ids, documents ending with eos.

Source: github.com/karpathy/nanoGPT, data/openwebtext/prepare.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.chunks import CHUNK_TOKENS, Chunk
from hvdlm.data.entries import Extent
from hvdlm.data.extents import read_part
from hvdlm.data.files import open_checked

_OTHER_HEADERS = {20240520: "llm.c", 20240801: "llm.c (Llama 3)"}
"""First int32 of formats that look alike: their header would be taken for 512 tokens."""


def read_nanogpt(path: Path, eos_id: int) -> Iterator[Chunk]:
    """The documents of a file; at its end a document ends, with or without eos.

    Args:
        path: The file.
        eos_id: Ends a document.

    Yields:
        uint16 tokens.

    Raises:
        UserError: It is missing, empty, or holds no whole number of tokens.
    """
    size = file_size(path)
    if size == 0 or size % 2:
        raise UserError(f"{path}: has {size} bytes; needed uint16 tokens, so an even number: copy it again")
    extent, count = Extent(0, "<u2", size // 2), size // 2
    fd = open_checked(path, size)
    try:
        head = read_part(fd, path, extent, first=0, size=min(count, 2))
        if len(head) == 2 and (known := _OTHER_HEADERS.get(int(head.view("<u4")[0]))):
            raise UserError(f"{path}: begins with the header of {known}, not with tokens; cut 1024 bytes off")
        for first in range(0, count, CHUNK_TOKENS):
            tokens = read_part(fd, path, extent, first=first, size=min(CHUNK_TOKENS, count - first))
            ends = np.flatnonzero(tokens == eos_id) + 1
            if first + len(tokens) == count and tokens[-1] != eos_id:
                ends = np.append(ends, len(tokens))
            yield Chunk(tokens, ends)
    finally:
        os.close(fd)


def file_size(path: Path) -> int:
    """Bytes of a file that a user named.

    Raises:
        UserError: There is none.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from error
