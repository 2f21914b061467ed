"""Which processes make one data set together, as their launcher tells."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from hvdlm.comm import mpi
from hvdlm.comm.launch import classify, needs_meeting


@dataclass(frozen=True)
class Crew:
    """One process among those that were started together.

    Attributes:
        name: equal in all of them, different in every start; a file name.
        rank: this one.
        size: how many; those of a job array may run at different times.
        local_size: how many on this host; 0 = not known.
        apart: each has a log of its own (the elements of a job array).
        uses_mpi: MPI was started, and is to be ended with `leave`.
    """

    name: str
    rank: int = 0
    size: int = 1
    local_size: int = 1
    apart: bool = False
    uses_mpi: bool = False

    def leave(self) -> None:
        """End MPI where it was started. Collective there."""
        if self.uses_mpi:
            mpi.finish()


def alone() -> Crew:
    """A crew of this process."""
    return Crew(f"alone-{secrets.token_hex(6)}")


def find(env: Mapping[str, str] | None = None) -> Crew:
    """Find out who works together.

    - under `mpirun`, or `srun` with a PMI: the ranks, which agree on a name by one broadcast
    - several tasks under `srun` without a PMI: Slurm numbers them, MPI is not touched
    - an element of a Slurm job array: all elements, each possibly with several ranks; MPI is not touched
    - else: this process

    Args:
        env: the environment; None = this process's.

    Collective: under MPI.
    """
    env = os.environ if env is None else env
    array, launch = env.get("SLURM_ARRAY_JOB_ID"), classify(env)
    if array:
        element = int(env["SLURM_ARRAY_TASK_ID"]) - int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
        elements = int(env.get("SLURM_ARRAY_TASK_COUNT", "1"))
        rank, size = element * launch.size + launch.rank, elements * launch.size
        return Crew(f"array-{array}", rank, size, launch.local_size, apart=True)
    if needs_meeting(launch, env):
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        step = f"step-{'.'.join(env.get(name, '0') for name in names)}"
        return Crew(step, launch.rank, launch.size, launch.local_size)
    if launch.kind == "single":
        return alone()
    if launch.kind == "gloo":
        step = f"gloo-{env['HOROVOD_GLOO_RENDEZVOUS_ADDR']}-{env.get('HOROVOD_GLOO_RENDEZVOUS_PORT', '0')}"
        return Crew(step, launch.rank, launch.size, launch.local_size)
    name = mpi.agree(f"mpi-{secrets.token_hex(6)}", size=launch.size)
    return Crew(name, launch.rank, launch.size, launch.local_size, uses_mpi=True)
