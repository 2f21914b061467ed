"""Windows read through h5py, by one process or by DataLoader's workers: what training does not do.

For comparison (`python -m hvdlm.bench loader`), and the shortest way to a shard for somebody else's program.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import h5py
import numpy as np
import torch

from hvdlm.data.manifest import read_manifest
from hvdlm.data.order import first_windows, locate


@final
class Hdf5Windows:
    """A map-style data set of the windows of one split, in their own order.

    Args:
        folder: The data set.
        split: "train" or "val".
        seq_len: T; a window has T + 1 tokens.
    """

    def __init__(self, folder: Path, split: str, *, seq_len: int) -> None:
        entries = read_manifest(folder).split(split)
        self._paths = [folder / entry.name for entry in entries]
        self._first = first_windows(np.array([entry.tokens for entry in entries]), seq_len)
        self._seq_len = seq_len
        # Opened by whoever reads: libhdf5's state does not survive a fork or a pickle.
        self._tokens: list[h5py.Dataset] = []

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, window: int) -> torch.Tensor:
        """int64 [T + 1]."""
        return torch.from_numpy(self._slice(window).astype(np.int64))

    def batch(self, windows: Sequence[int]) -> torch.Tensor:
        """int64 [m, T + 1], converted at once."""
        return torch.from_numpy(np.stack([self._slice(window) for window in windows]).astype(np.int64))

    def _slice(self, window: int) -> np.ndarray:
        if not self._tokens:
            self._tokens = [h5py.File(path, "r", locking=False)["tokens"] for path in self._paths]
        shards, firsts = locate(np.array([window]), self._first, self._seq_len)
        first = int(firsts[0])
        return np.asarray(self._tokens[int(shards[0])][first : first + self._seq_len + 1])
