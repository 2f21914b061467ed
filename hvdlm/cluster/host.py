"""Probes of the host and the Python packages on it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from hvdlm.cluster.finding import INSTALL, Finding, ask, judge

_SPACE_GIB = 5.0
_SHARED_MIB = 256
_HDF5_CODE = "import json, h5py; print(json.dumps({'hdf5': h5py.version.hdf5_version}))"


def probe_python() -> Iterator[Finding]:
    yield judge(
        "python",
        sys.version_info >= (3, 11),
        found=f"{sys.version.split()[0]} at {sys.executable}",
        needed="3.11 or newer",
        fix=f"{INSTALL} --python PYTHON",
    )


def probe_packages() -> Iterator[Finding]:
    """One finding for each package that hvdlm itself requires."""
    try:
        required = [text for text in metadata.requires("hvdlm") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        yield Finding("hvdlm", "fail", "not installed", "an install of this checkout", INSTALL)
        return
    yield Finding("hvdlm", "ok", metadata.version("hvdlm"))
    for text in sorted(required):
        yield _package(text.partition(";")[0].strip())


def _package(requirement: str) -> Finding:
    name = re.split(r"[^\w.-]", requirement)[0]
    needed = re.sub(r"^\[.*?\]", "", requirement.removeprefix(name)).strip()
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", "not installed", needed, INSTALL)
    return judge(name, _satisfies(found, needed), found=found, needed=needed, fix=INSTALL)


def _satisfies(version: str, needed: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(needed).contains(version, prereleases=True)


def probe_hdf5() -> Iterator[Finding]:
    facts, outcome = ask(_HDF5_CODE, limit_s=30)
    if facts is None:
        yield Finding("hdf5", "fail", outcome.reason, "an h5py that imports", INSTALL)
        return
    version = tuple(int(part) for part in re.findall(r"\d+", facts["hdf5"])[:2])
    yield judge("hdf5", version >= (1, 10), found=facts["hdf5"], needed="1.10 or newer", fix=INSTALL)


def probe_space() -> Iterator[Finding]:
    """The current folder, where data and runs go by default, and shared memory."""
    free_gib = shutil.disk_usage(".").free / 2**30
    yield judge(
        "free space",
        free_gib >= _SPACE_GIB,
        found=f"{free_gib:.1f} GiB in {Path.cwd()}",
        needed=f"{_SPACE_GIB:g} GiB",
        fix="free some space, or point train.out and data.path at another file system",
        otherwise="warn" if free_gib >= 0.5 else "fail",
    )
    writable = os.access(".", os.W_OK)
    fix = "go to another folder, or pass --train.out"
    yield judge(
        "folder", writable, found="writable" if writable else "not writable", needed="writable", fix=fix
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free_mib = shutil.disk_usage(shared).free / 2**20 if os.access(shared, os.W_OK) else 0
        yield judge(
            "shared memory",
            free_mib >= _SHARED_MIB,
            found=f"{free_mib:.0f} MiB to write in {shared}",
            needed=f"{_SHARED_MIB} MiB for the ranks of one host",
            fix="start the container with a larger shared memory (--shm-size), or empty /dev/shm",
            otherwise="warn" if free_mib else "fail",
        )


def probe_limits() -> Iterator[Finding]:
    """Locked memory, which InfiniBand pins its buffers in, and the cores this process may use."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = limit == resource.RLIM_INFINITY
    devices = Path("/sys/class/infiniband")
    fabric = devices.is_dir() and any(devices.iterdir())
    yield judge(
        "memlock",
        unlimited or not fabric,
        found=("unlimited" if unlimited else f"{limit >> 10} KiB")
        + ("" if fabric else ", no InfiniBand here"),
        needed="unlimited, for InfiniBand",
        fix="ask your site for 'memlock unlimited' in limits.conf and LimitMEMLOCK=infinity for slurmd",
        otherwise="warn",
    )
    yield Finding("cores", "ok", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process")
