"""The demo corpus as a data set, for those who start with nothing."""

from __future__ import annotations

import os
from pathlib import Path

from hvdlm.config import DataConfig
from hvdlm.corpus.build import build
from hvdlm.corpus.options import Options
from hvdlm.data.manifest import Manifest


def prepare(out: Path) -> Manifest:
    """Make the data set that `python -m hvdlm.preprocess` without arguments makes, unless it is there.

    Several processes of one host may call this for one folder: one works, the others wait. Worker
    processes are spawned: call it before MPI starts, and from a main module that may be
    imported again.

    Args:
        out: its folder.

    Raises:
        UserError: the folder holds another data set, the disk is full, or Python has no sources.
    """
    return build(Options(out), workers=len(os.sched_getaffinity(0)), wait=True).manifest


def prepare_if_asked(path: str | dict[str, int], *, is_demo: bool) -> None:
    """Make it where the demo recipe is to train on it and it is not there; else nothing.

    Args:
        path: `data.path` of the run.
        is_demo: whether its recipe is the demo's.

    Raises:
        UserError: as `prepare`.
    """
    (own,) = DataConfig().weights
    if is_demo and path == own and not (Path(own) / "manifest.json").exists():
        prepare(Path(own))
