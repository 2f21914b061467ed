"""How many workers a host runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def slots_of_host(asked: int, env: Mapping[str, str]) -> int:
    """What was asked for, else the job's tasks a node, else the GPUs, else one.

    Args:
        asked: 0 = automatic.
        env: this process's environment.
    """
    if asked:
        return asked
    tasks = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", ""))
    return int(tasks[0]) if tasks else max(1, _gpus(env))


def _gpus(env: Mapping[str, str]) -> int:
    """Without torch, which takes seconds: those that are visible, or all there are."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return len([name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()])
    folder = Path("/proc/driver/nvidia/gpus")
    return len([*folder.iterdir()]) if folder.is_dir() else 0
