"""How much memory is left to this process before the kernel ends something: of its cgroups and its node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# Version 2, then version 1: the limit, what is used, and which of that is cache of files. The kernel
# takes such cache back before it kills, and reading a corpus fills any cgroup with it.
_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


class Left(NamedTuple):
    """Of `limit_bytes`, `available_bytes` are not used or can be taken back."""

    available_bytes: int
    limit_bytes: int

    @property
    def part(self) -> float:
        """Available, of the limit."""
        return self.available_bytes / self.limit_bytes


def memory_left(*, own: Path = _OWN, cgroups: Path = _CGROUPS) -> Left:
    """The tightest of all limits that hold for this process.

    Args:
        own: the kernel's list of this process's cgroups.
        cgroups: where they are mounted.

    Source: cgroups(7); Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    node = psutil.virtual_memory()
    limits = [Left(node.available, node.total)]
    for folder in _folders(own, cgroups):
        limits += [left for names in _FILES if (left := _read(folder, names)) is not None]
    return min(limits, key=lambda left: left.part)


def _folders(own: Path, cgroups: Path) -> Iterator[Path]:
    """This process's memory cgroups and all above them: Slurm limits the job, the step and the task.

    In a container the path may be one of the host, which is not there: what is mounted is then the
    process's own.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            mount = cgroups / "memory"
        elif number == "0":
            mount = cgroups if (cgroups / "cgroup.controllers").exists() else cgroups / "unified"
        else:
            continue
        inside = mount / path.lstrip("/")
        yield from [inside, *(parent for parent in inside.parents if parent.is_relative_to(mount))]


def _read(folder: Path, names: tuple[str, str, tuple[str, ...]]) -> Left | None:
    """None where there is no limit, or none that can be read."""
    limit_name, used_name, cache_names = names
    try:
        limit = int((folder / limit_name).read_text())
        used = int((folder / used_name).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(value) for name, value in pairs if name in cache_names)
    except (OSError, ValueError):
        # "max" is no number.
        return None
    # Version 1 says "no limit" by a number larger than any memory.
    if not 0 < limit < psutil.virtual_memory().total:
        return None
    return Left(max(0, limit - used + cache), limit)
