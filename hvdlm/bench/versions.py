"""Versions of the libraries that a benchmark measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable


def installed(names: Iterable[str]) -> dict[str, str]:
    """The version of each package; what is not installed is left out."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def line(versions: dict[str, str]) -> str:
    """For people."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
