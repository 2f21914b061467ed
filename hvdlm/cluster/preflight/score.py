"""How fast a node computes: a figure to compare it with others of its kind, not with a data sheet."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvdlm.cluster.finding import ask

_SIDE = 384
_COPY_BYTES = 32 << 20
_TRIES = 30
_PAUSE_S = 0.03
_GPU_LIMIT_S = 60.0
_GPU_CODE = """
import json, time, torch
def tflops(device, side=4096, tries=20):
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(tries):
        a @ a
    torch.cuda.synchronize(device)
    return 2 * side**3 * tries / (time.perf_counter() - begin) / 1e12
print(json.dumps({"tflops": [tflops(f"cuda:{i}") for i in range(torch.cuda.device_count())]}))
"""


def score() -> dict[str, Any]:
    """Of several tries the best, because what else runs on a node only ever makes it slower.

    Returns:
        gflops of a product of two matrices and gib_s of a copy in memory, both on one core; how many cores
        there are; tflops of each GPU in bf16 where there are any.
    """
    # One core's: how many there are is known. Before numpy's library starts its threads.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    import numpy as np

    a = np.ones((_SIDE, _SIDE), dtype=np.float32)
    source, target = (np.ones(_COPY_BYTES // 8) for _ in range(2))
    multiply_s, copy_s = _best_s([lambda: a @ a, lambda: np.copyto(target, source)])
    found: dict[str, Any] = {
        "gflops": 2 * _SIDE**3 / multiply_s / 1e9,
        "gib_s": _COPY_BYTES / copy_s / 2**30,
        "cores": len(os.sched_getaffinity(0)),
    }
    if shutil.which("nvidia-smi"):
        said, outcome = ask(_GPU_CODE, limit_s=_GPU_LIMIT_S)
        found["tflops"] = said["tflops"] if said else []
        found["gpu_trouble"] = "" if said else outcome.reason
    return found


def _best_s(works: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each, with pauses, so that what else runs does not run all the time."""
    best = [float("inf")] * len(works)
    for _ in range(_TRIES):
        for number, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - begin)
        time.sleep(_PAUSE_S)
    return best
