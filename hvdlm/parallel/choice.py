"""parallel.strategy=auto: what `bench step` found to be the fastest on this machine."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "data/bench-step.json"
DEFAULT = "allreduce"
_CANDIDATES = ("allreduce", "buckets", "zero1")
_GAIN = 0.01
"""Another strategy must be faster by so much: less is noise."""


def choose(path: Path) -> tuple[str, str]:
    """The strategy to take, and why, in a line for the user.

    Args:
        path: what `bench step` wrote when it last ran on several ranks; may be missing.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ratios = {row["strategy"]: float(row["ratio"]) for row in found["rows"] if row["wire"] == "none"}
        where = f"{found['ranks']} ranks, {found['device']}"
        best = min((name for name in _CANDIDATES if name in ratios), key=lambda name: ratios[name])
        default = ratios[DEFAULT]
    except FileNotFoundError:
        how = "mpirun -np N python -m hvdlm.bench step"
        return DEFAULT, f"parallel.strategy auto: {DEFAULT}, as nothing was measured here; {how}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return DEFAULT, f"parallel.strategy auto: {DEFAULT}, as {path} cannot be read ({error})"
    if ratios[best] > (1 - _GAIN) * default:
        best = DEFAULT
    others = ", ".join(f"{name} {ratios[name]:.3f}" for name in _CANDIDATES if name in ratios)
    return best, f"parallel.strategy auto: {best}, by {path} (times of a step alone: {others}; {where})"
