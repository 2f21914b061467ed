"""A site's file: what it sets, for sbatch and for the batch script."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import final

import hvdlm
from hvdlm.cluster.bounded import run_bounded
from hvdlm.config import UserError

SCRIPTS = Path(hvdlm.__file__).parents[1] / "slurm"
"""Where a checkout has its batch scripts and sites."""

_READ_LIMIT_S = 30.0


@final
@dataclass(frozen=True)
class Site:
    """A site's file, read by the shell that the batch script reads it with.

    Attributes:
        path: absolute.
        variables: what differs from this process's environment once it was read.
    """

    path: Path
    variables: dict[str, str]

    @property
    def sbatch_options(self) -> list[str]:
        """What it puts on sbatch's command line."""
        return shlex.split(self.variables.get("HVDLM_SBATCH", os.environ.get("HVDLM_SBATCH", "")))

    @property
    def mpi(self) -> str:
        """A type of `srun --mpi`, or mpirun."""
        return self.variables.get("HVDLM_MPI") or os.environ.get("HVDLM_MPI") or "pmix"


def find_script(name: str) -> Path:
    """A batch script by its path, or by the name of one of this checkout."""
    return Path(name) if Path(name).exists() or "/" in name else SCRIPTS / name


def read_site(name: str) -> Site:
    """Read a site's file.

    Args:
        name: its path, or the name of one in slurm/sites.

    Raises:
        UserError: there is no such file, or the shell cannot read it.
    """
    path = Path(name) if "/" in name or Path(name).is_file() else SCRIPTS / "sites" / f"{name}.env"
    if not path.is_file():
        there = ", ".join(sorted(one.stem for one in (SCRIPTS / "sites").glob("*.env")))
        raise UserError(f"--site {name}: no file {path}; give a path, or one of: {there}")
    command = ["bash", "-euc", 'set -a +u; . "$1" >&2; env -0', "bash", str(path.absolute())]
    outcome = run_bounded(command, limit_s=_READ_LIMIT_S)
    if outcome.code != 0:
        raise UserError(f"{path}: bash cannot read it: {outcome.reason}; it must set variables only")
    pairs = [entry.partition("=") for entry in outcome.output.split("\0") if "=" in entry]
    own = {"_", "SHLVL", "PWD", "OLDPWD", "HVDLM_BOUNDED_CHILD"}
    variables = {k: v for k, _, v in pairs if k not in own and os.environ.get(k) != v and k.isidentifier()}
    return Site(path.absolute(), variables)
