"""`python watched_train.py ARGUMENTS`: the training command, slowed down where it can be seen at work.

SLOW_STAGE_S: seconds that each piece of a staged file takes. READ_BLOCKS: a file that gets a line
"SHARD BLOCK" for each block that is verified. READ_FOLDERS: a file that gets a line "SPLIT FOLDER" for
each reader. MOST_BLOCKS: after so many a rank verifies no more.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from hvdlm.config import run_command
from hvdlm.data import loader, stage, verify
from hvdlm.train.__main__ import main

SLOW_STAGE_S = float(os.environ.get("SLOW_STAGE_S", "0"))
READ_BLOCKS = os.environ.get("READ_BLOCKS", os.devnull)
READ_FOLDERS = os.environ.get("READ_FOLDERS", os.devnull)
MOST_BLOCKS = int(os.environ.get("MOST_BLOCKS", "1000"))
read_block, write_exactly, reader = verify.read_block, stage.write_exactly, loader.WindowReader
blocks_read: list[int] = []


def write_slowly(*arguments: Any) -> None:
    write_exactly(*arguments)
    time.sleep(SLOW_STAGE_S)


def read_and_tell(fd: int, path: Path, entry: Any, block: int) -> Any:
    with Path(READ_BLOCKS).open("a") as file:
        file.write(f"{path.name} {block}\n")
    blocks_read.append(block)
    return read_block(fd, path, entry, block)


def reader_that_tells(sources: Any, split: str, **more: Any) -> Any:
    with Path(READ_FOLDERS).open("a") as file:
        file.writelines(f"{split} {source.folder}\n" for source in sources)
    return reader(sources, split, **more)


def stopped_after(self: Any, read_bytes: int) -> bool:
    return bool(self._stop.wait() if len(blocks_read) >= MOST_BLOCKS else self._stop.is_set())


if __name__ == "__main__":
    stage.write_exactly = write_slowly
    loader.WindowReader = reader_that_tells  # type: ignore[misc, assignment]
    verify.read_block = read_and_tell
    verify._Brake.stopped_after = stopped_after  # type: ignore[method-assign]
    sys.exit(run_command("train", main))
