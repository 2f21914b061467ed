"""What a node says of itself. Nothing is judged here: most of it means something only beside other nodes."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import hvdlm
from hvdlm.cluster.bounded import run_bounded

_PACKAGES = ("torch", "horovod", "mpi4py", "numpy", "h5py")
_SMI_LIMIT_S = 20.0
_SMI_FIELDS = ("name", "driver_version", "ecc.errors.uncorrected.volatile.total")
_LISTEN_S = 0.5
_BUSY = 0.5


def hello() -> dict[str, Any]:
    """Who is there."""
    return {"host": socket.gethostname(), "kernel": platform.release()}


def clock() -> dict[str, Any]:
    """Seconds since 1970."""
    return {"unix": time.time()}


def software() -> dict[str, Any]:
    """The digest of this package's files, and the versions of what it stands on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {"code": code_digest(), "folder": str(_package()), **versions}


def code_digest() -> str:
    """Of every Python file and recipe of the package, with its name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in _package().rglob("*") if path.suffix in (".py", ".toml")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_package())} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _package() -> Path:
    return Path(hvdlm.__file__).parent


def gpus() -> dict[str, Any]:
    """Each GPU's name, driver and uncorrectable errors since the driver was loaded, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": [], "trouble_found": ""}
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    outcome = run_bounded(query, limit_s=_SMI_LIMIT_S)
    if outcome.code != 0:
        return {"gpus": [], "trouble_found": f"nvidia-smi: {outcome.reason}"}
    rows = [[cell.strip() for cell in row] for row in csv.reader(outcome.output.splitlines()) if row]
    found = [{"name": row[0], "driver": row[1], "errors": row[2]} for row in rows if len(row) == 3]
    return {"gpus": found, "trouble_found": ""}


def links(devices: str = "/sys/class/infiniband") -> dict[str, Any]:
    """State and rate of every port of InfiniBand (or RoCE) devices.

    Source: Linux, Documentation/ABI/stable/sysfs-class-infiniband.
    """
    ports = {}
    for port in sorted(Path(devices).glob("*/ports/*")):
        state, rate = ((port / name).read_text().strip() for name in ("state", "rate"))
        ports[f"{port.parts[-3]}/{port.name}"] = {"state": state.partition(": ")[2] or state, "rate": rate}
    return {"ports": ports}


def space(folders: list[str]) -> dict[str, Any]:
    """Free bytes and inodes of folders and of this node's temporary one; inodes -1 where none are counted."""
    found = {}
    for folder in [*folders, tempfile.gettempdir()]:
        stat = os.statvfs(folder)
        inodes = stat.f_favail if stat.f_files else -1
        found[folder] = {"bytes": stat.f_bavail * stat.f_frsize, "inodes": inodes}
    return {"folders": found}


def memlock() -> dict[str, Any]:
    """Bytes that a process here may lock, -1 for no limit; and whether there is a fabric that needs it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {"bytes": -1 if limit == resource.RLIM_INFINITY else limit, "fabric": bool(links()["ports"])}


def load() -> dict[str, Any]:
    """Processes that are not this job's and keep a core or a GPU busy, or hang in the kernel."""
    own = os.environ.get("SLURM_JOB_ID", "")
    foreign = [process for process in psutil.process_iter(["name", "username"]) if not _of_job(process, own)]
    for process in foreign:
        _share(process)
    time.sleep(_LISTEN_S)
    busy = []
    for process in foreign:
        share = _share(process)
        if share >= _BUSY:
            busy.append(f"{process.info['name']} ({process.pid}, {process.info['username']}) {share:.0%}")
    return {"busy": busy[:8], "on_gpus": _on_gpus(own)}


def _share(process: psutil.Process) -> float:
    """Of one core, since it was last asked."""
    try:
        return float(process.cpu_percent()) / 100
    except psutil.Error:
        return 0.0


def _of_job(process: psutil.Process, job: str) -> bool:
    try:
        # Without a command line it is a thread of the kernel.
        return not process.cmdline() or process.environ().get("SLURM_JOB_ID") == job
    except (psutil.Error, OSError):
        return False


def _on_gpus(job: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    outcome = run_bounded(query, limit_s=_SMI_LIMIT_S)
    rows = [row for row in csv.reader(outcome.output.splitlines()) if len(row) == 2 and row[0].isdigit()]
    return [f"process {pid}:{used}" for pid, used in rows if not _is_own(int(pid), job)]


def _is_own(pid: int, job: str) -> bool:
    try:
        return _of_job(psutil.Process(pid), job)
    except psutil.Error:
        return False
