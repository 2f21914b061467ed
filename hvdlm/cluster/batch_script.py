"""The options of a batch job: those of its script, of sbatch's variables, and of the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.config import UserError

Options = dict[str, str]
"""Long names without dashes; '' for an option without a value."""

_LONG = {
    "-A": "account",
    "-C": "constraint",
    "-G": "gpus",
    "-J": "job-name",
    "-N": "nodes",
    "-c": "cpus-per-task",
    "-d": "dependency",
    "-n": "ntasks",
    "-o": "output",
    "-p": "partition",
    "-q": "qos",
    "-t": "time",
}
# Of the variables that sbatch reads, those whose option some check looks at.
_VARIABLES = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_GRES": "gres",
    "SBATCH_JOB_NAME": "job-name",
}


def of_script(path: Path) -> Options:
    """The #SBATCH lines; as sbatch does, up to the first line that is neither a comment nor blank.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--script {path}: cannot be read ({error}); give the path of a batch script"
        ) from error
    words: list[str] = []
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
    return of_words(words)


def of_words(words: Sequence[str]) -> Options:
    """Options as on sbatch's command line, of which the last wins."""
    options: Options = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", word, re.DOTALL):
            name, value = match[1], match[2]
        elif word[:2] in _LONG:
            name, value = _LONG[word[:2]], word[2:] or None
        else:
            continue
        if value is None and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        options[name] = value or ""
    return options


def of_variables(env: Mapping[str, str]) -> Options:
    """What sbatch takes from its environment; it wins over the script, and loses to the command line."""
    return {option: env[name] for name, option in _VARIABLES.items() if name in env}


def gpus_per_node(options: Mapping[str, str]) -> int:
    """GPUs asked for on each node: by --gpus-per-node or --gres, with or without a type; 0 for none."""
    asked = [options.get("gpus-per-node", ""), *_gpu_parts(options.get("gres", ""))]
    return max(int(found[1]) if (found := re.search(r"(?:^|:)(\d+)$", one)) else 0 for one in asked)


def _gpu_parts(gres: str) -> list[str]:
    return [f"{part}:1" if part == "gpu" else part for part in gres.split(",") if part.startswith("gpu")]
