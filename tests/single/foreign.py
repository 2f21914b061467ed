"""Token files of other programs, written and read here by their published layout alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

NUMPY_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, code: int = 8
) -> dict[str, bytearray]:
    """PREFIX.bin and PREFIX.idx of documents of sequences of ids; what was written, to be changed."""
    ids = NUMPY_OF_CODE[code]
    sequences = [np.array(sequence, ids) for document in documents for sequence in document]
    data, lengths, pointers, ends = bytearray(), b"", b"", struct.pack("<q", 0)
    for sequence in sequences:
        lengths += struct.pack("<i", len(sequence))
        pointers += struct.pack("<q", len(data))
        data += sequence.tobytes()
    count = 0
    for document in documents:
        count += len(document)
        ends += struct.pack("<q", count)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1)
    files = {"bin": data, "idx": bytearray(head + lengths + pointers + ends)}
    for suffix, content in files.items():
        Path(f"{prefix}.{suffix}").write_bytes(content)
    return files


def read_megatron(prefix: Path) -> tuple[int, list[list[int]]]:
    """The type code, and the ids of each document."""
    index = Path(f"{prefix}.idx").read_bytes()
    data = Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    ends = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    assert (ends[0], ends[-1]) == (0, sequences)
    item = np.dtype(NUMPY_OF_CODE[code]).itemsize
    assert sum(lengths) * item == len(data)
    parts = [
        np.frombuffer(data, NUMPY_OF_CODE[code], length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    documents = [[id for part in parts[first:end] for id in part] for first, end in pairwise(ends)]
    return code, documents
