"""Hanging up on peers that a library is connected to.

Gloo hears at once of a neighbor in the ring that is gone, and of another one only by its timeout: the
ranks in between still are there. Where somebody else knows of the loss, the connections are shut down
under it, and it fails at once, as it does for a neighbor.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TypeAlias

Sockets: TypeAlias = dict[int, str]
"""Open sockets of this process: file descriptors, with what tells each from a later one of its number."""

_DESCRIPTORS = Path("/proc/self/fd")


def open_sockets() -> Sockets:
    """All that are open now."""
    found = {}
    for entry in _DESCRIPTORS.iterdir():
        # One that was closed meanwhile, that of this very look included.
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if name.startswith("socket:"):
                found[int(entry.name)] = name
    return found


def opened_since(before: Sockets) -> Sockets:
    """All that are open now and were not then."""
    return {fd: name for fd, name in open_sockets().items() if before.get(fd) != name}


def hang_up(sockets: Sockets) -> None:
    """Shut down those that are connected to another host or process by TCP; listening ones stay."""
    for fd, name in sockets.items():
        with contextlib.suppress(OSError):
            if str((_DESCRIPTORS / str(fd)).readlink()) == name:
                with socket.socket(fileno=os.dup(fd)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.getpeername()
                        connection.shutdown(socket.SHUT_RDWR)
