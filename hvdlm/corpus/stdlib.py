"""The demo corpus's files: the Python standard library's own sources, real text on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from hvdlm.config import UserError
from hvdlm.corpus.sources import InputFile, describe

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders with other people's code, or with test data that is broken on purpose."""
VOCAB_SIZE = 1024


def find() -> list[InputFile]:
    """Find the sources of this Python, without tests, third-party code and files that are not UTF-8.

    Returns:
        The files sorted by path.

    Raises:
        UserError: this Python came without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT & {*path.relative_to(folder).parts})
    files = [describe(path) for path in paths if path.is_file() and _is_text(path)]
    if not files:
        raise UserError(f"{folder}: no sources of the standard library here; name an INPUT of your own")
    return files


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return False
