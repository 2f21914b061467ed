"""The readers of `bench loader`, each an endless source of int64 batches [16, 2049] of the same tokens."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import read_manifest
from hvdlm.data.sources import read_sources
from hvdlm.data.through_hdf5 import Hdf5Windows

SEQ_LEN = 2048
BATCH = 16
FLAT_FILE = "tokens.bin"
"""All ids of the shards in one file, as nanoGPT has them; written by `bench loader`."""
_DRAWN_BATCHES = 256  # Random places drawn at a time, so that drawing costs the others next to nothing.
_LITDATA_ITEM_TOKENS = 1 << 16  # Its chunks end between items.
# 40 million tokens are 16 such chunks, as many as 1 GB in its documentation's chunks of 64 MB: of a few it
# would keep all mapped.
_LITDATA_CHUNK_TOKENS = 40 * _LITDATA_ITEM_TOKENS

Reader = Callable[[Path], Iterator[Any]]


def hvdlm_loader(
    folder: Path, *, prefetch_steps: int = 0, document_mask: bool = False
) -> Generator[Any, None, None]:
    """This project's loader: order, look-up, checks; in this thread, or read ahead by its own."""
    plan = BatchPlan(SEQ_LEN, BATCH, BATCH, seed=0, document_mask=document_mask)
    sources = read_sources([str(folder)])
    loader = Loader(sources, "train", plan=plan, share=(0, 1), prefetch_steps=prefetch_steps)
    try:
        for batch in loader.steps(0):
            yield batch.slots[0].batch
    finally:
        loader.close()


def bare_preadv(folder: Path) -> Iterator[Any]:
    """The floor: preadv of each window of the same shards into a buffer, and one conversion a batch."""
    entries = read_manifest(folder).split("train")
    fds = np.array([os.open(folder / entry.name, os.O_RDONLY) for entry in entries])
    offsets = np.array([entry.extents.tokens.offset for entry in entries])
    starts = min(entry.tokens for entry in entries) - SEQ_LEN
    raw = np.empty((BATCH, SEQ_LEN + 1), np.uint16)
    rows = [row.data.cast("B") for row in raw]
    rng, drawn = np.random.default_rng(0), (_DRAWN_BATCHES, BATCH)
    try:
        while True:
            shards = rng.integers(len(entries), size=drawn)
            places = offsets[shards] + 2 * rng.integers(starts, size=drawn)
            for batch in zip(fds[shards].tolist(), places.tolist(), strict=True):
                for row, fd, place in zip(rows, *batch, strict=True):
                    os.preadv(fd, [row], place)
                yield torch.from_numpy(raw.astype(np.int64))
    finally:
        for fd in fds.tolist():
            os.close(fd)


def nanogpt(folder: Path) -> Iterator[Any]:
    """np.memmap, opened again for every batch; each window of inputs and labels converted, then stacked."""
    while True:
        data = np.memmap(folder / FLAT_FILE, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - SEQ_LEN, (BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        yield x, y


def h5py_slices(folder: Path) -> Iterator[Any]:
    """Slices of the same shards through h5py, one conversion a batch."""
    windows = Hdf5Windows(folder, "train", seq_len=SEQ_LEN)
    rng = np.random.default_rng(0)
    while True:
        for drawn in rng.integers(len(windows), size=(_DRAWN_BATCHES, BATCH)).tolist():
            yield windows.batch(drawn)


def torch_workers(folder: Path) -> Iterator[Any]:
    """torch's DataLoader over h5py, shuffled, a spawned worker for each core up to four."""
    windows = Hdf5Windows(folder, "train", seq_len=SEQ_LEN)
    loader: DataLoader[torch.Tensor] = DataLoader(
        cast("Dataset[torch.Tensor]", windows),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=min(4, len(os.sched_getaffinity(0))),
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    return _again_and_again(loader)


def litdata(folder: Path) -> Iterator[Any]:
    """litdata's TokensLoader, windows from anywhere, as the loader's order has them; without workers."""
    windows = _litdata_windows(folder, shuffle=False)
    rng = np.random.default_rng(0)
    while True:
        for drawn in rng.integers(len(windows), size=(_DRAWN_BATCHES, BATCH)).tolist():
            yield torch.stack([windows[i] for i in drawn]).to(torch.int64)


def litdata_by_chunk(folder: Path) -> Iterator[Any]:
    """litdata's TokensLoader in its own order: shuffled chunks, one at a time; without workers."""
    from litdata import StreamingDataLoader

    windows = _litdata_windows(folder, shuffle=True)
    loader = StreamingDataLoader(windows, batch_size=BATCH, num_workers=0, drop_last=True)
    for batch in _again_and_again(loader):
        yield batch.to(torch.int64)


def mosaicml_streaming(folder: Path) -> Iterator[Any]:
    """mosaicml-streaming over samples cut beforehand, shuffled, without workers."""
    from streaming import MDSWriter, StreamingDataset

    target, width = folder / "streaming", SEQ_LEN + 1
    if not target.exists():
        ids = np.fromfile(folder / FLAT_FILE, np.uint16)
        with MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{width}"}) as writer:
            for row in ids[: len(ids) // width * width].reshape(-1, width):
                writer.write({"tokens": row})
    windows = StreamingDataset(local=str(target), shuffle=True, batch_size=BATCH)
    loader = DataLoader(windows, batch_size=BATCH, num_workers=0, drop_last=True, collate_fn=_stack)
    return _again_and_again(loader)


READERS: dict[str, Reader] = {
    "hvdlm": hvdlm_loader,
    "hvdlm read ahead": functools.partial(hvdlm_loader, prefetch_steps=4),
    "hvdlm masked": functools.partial(hvdlm_loader, document_mask=True),
    "bare preadv": bare_preadv,
    "nanoGPT": nanogpt,
    "h5py": h5py_slices,
    "torch workers": torch_workers,
    "litdata": litdata,
    "litdata by chunk": litdata_by_chunk,
    "streaming": mosaicml_streaming,
}
OPTIONAL = {"litdata": "litdata", "litdata by chunk": "litdata", "streaming": "streaming"}
"""What readers import that not everybody has."""


def installed() -> dict[str, Reader]:
    """The readers that this environment can run."""
    return {
        name: reader
        for name, reader in READERS.items()
        if name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name]) is not None
    }


def _litdata_windows(folder: Path, *, shuffle: bool) -> Any:
    """Its data set of the same tokens, written when the first batch is asked for: readers take turns."""
    import litdata as library

    target = folder / "litdata"
    if not target.exists():
        library.optimize(
            fn=_FlatTokens(folder / FLAT_FILE),
            inputs=[0],
            output_dir=str(target),
            chunk_size=_LITDATA_CHUNK_TOKENS,
            item_loader=library.TokensLoader(),
            num_workers=1,
            start_method="spawn",
            verbose=False,
        )
    loader = library.TokensLoader(block_size=SEQ_LEN + 1)
    return library.StreamingDataset(str(target), item_loader=loader, shuffle=shuffle, drop_last=True)


class _FlatTokens:
    """What litdata's workers, which are spawned, read their input with."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, _: int) -> Iterator[torch.Tensor]:
        ids = torch.from_numpy(np.fromfile(self._path, np.uint16))
        yield from ids.split(_LITDATA_ITEM_TOKENS)


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _stack(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
