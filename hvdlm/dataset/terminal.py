"""What is printed for people."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print what the terminal's encoding can show, the rest escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
