"""One document of a data set, found through /doc_offsets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hvdlm.config import UserError
from hvdlm.data.extents import read_part
from hvdlm.data.files import cure, open_checked
from hvdlm.data.manifest import Manifest


def read_document(folder: Path, manifest: Manifest, split: str, index: int) -> np.ndarray:
    """The ids of one document, eos included.

    Args:
        folder: The data set.
        manifest: Its manifest.
        split: "train" or "val".
        index: From 0, counted through the split's shards.

    Returns:
        uint16 or uint32 [tokens of the document].

    Raises:
        UserError: There is no such document, or its shard is missing or damaged.
    """
    count, before = manifest.documents(split), 0
    if not 0 <= index < count:
        raise UserError(f"{folder}: split {split!r} has documents 0 to {count - 1}, not {index}")
    for entry in manifest.split(split):
        if index < before + entry.documents:
            break
        before += entry.documents
    path, extents = folder / entry.name, entry.extents
    fd = open_checked(path, entry.file_bytes)
    try:
        bounds = read_part(fd, path, extents.doc_offsets, first=index - before, size=2)
        first, end = (int(bound) for bound in bounds)
        if not 0 <= first < end <= entry.tokens:
            raise UserError(f"{path}: doc_offsets are damaged; {cure(folder)}")
        return read_part(fd, path, extents.tokens, first=first, size=end - first)
    finally:
        os.close(fd)
