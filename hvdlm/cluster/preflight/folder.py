"""Whether what one node writes into the run folder is what another reads there."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

_POLL_S = 0.1


def write(folder: str, name: str, text: str) -> dict[str, Any]:
    """Write, fsync and rename a small file, as a checkpoint does; how long it took.

    Raises:
        OSError: the file system refuses.
    """
    begin = time.monotonic()
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".tmp-{name}")
    with temp.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temp.rename(path)
    return {"seconds": time.monotonic() - begin}


def read(folder: str, names: list[str], text: str, wait_s: float) -> dict[str, Any]:
    """Look for files of other nodes.

    Args:
        folder: where they are to be.
        names: of the files.
        text: what each has to hold.
        wait_s: a network file system may show another node's file seconds late.

    Returns:
        The names of those that are not there or hold something else.
    """
    give_up = time.monotonic() + wait_s
    while True:
        missing = [name for name in names if _content(Path(folder) / name) != text]
        if not missing or time.monotonic() > give_up:
            return {"missing": missing}
        # Listing makes a client of NFS ask its server again.
        list(Path(folder).iterdir())
        time.sleep(_POLL_S)


def forget(folder: str) -> dict[str, Any]:
    """Remove the folder; many nodes do it at once, and one whose folder is another does it alone."""
    shutil.rmtree(folder, ignore_errors=True)
    return {}


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
