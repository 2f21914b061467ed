"""How this process was launched, read from its environment, and what to set before MPI starts.

Pure functions of the environment: nothing here imports MPI or Horovod, so that a login node, a
single process under srun and a usage error never touch MPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hvdlm.config import ParallelConfig

UNKNOWN = 0
"""Local size where the launcher does not tell; MPI is asked once it has started."""


_GLOO_TIMEOUT = "HOROVOD_GLOO_TIMEOUT_SECONDS"
# With it and the fusion threshold in the environment, a second start of Horovod in one process ends
# with a segmentation fault (0.28.1, ParameterManager::BayesianParameter::SetValue).
CYCLE_TIME = "HOROVOD_CYCLE_TIME"


@dataclass(frozen=True)
class Launch:
    """One process among those started together, as its launcher announced it."""

    kind: Literal["single", "mpi", "gloo"]
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# Rank, size, local rank, local size as each launcher names them; the local ones may be missing.
_HOROVODRUN_GLOO = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def classify(env: Mapping[str, str]) -> Launch:
    """Tell how a process with this environment was launched.

    - *gloo*: `horovodrun --gloo`, which names ranks and a rendezvous server; or several tasks under
      `srun` without a PMI, which have to find each other (`comm.rendezvous`)
    - *mpi*: `mpirun`, `horovodrun`, or `srun` with a PMI that the MPI library can use
    - *single*: everything else, one task under srun included: MPI_Init without a matching PMI
      aborts the process, so MPI stays untouched
    """
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env and "HOROVOD_RANK" in env:
        return _launch("gloo", env, _HOROVODRUN_GLOO)
    for names in _MPI:
        if names[0] in env and names[1] in env:
            return _launch("mpi", env, names)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks <= 1:
        return Launch("single")
    return Launch(
        "mpi" if "PMIX_RANK" in env else "gloo",
        rank=int(env.get("PMIX_RANK", env["SLURM_PROCID"])),
        size=tasks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_size=local_tasks(env),
    )


def needs_meeting(launch: Launch, env: Mapping[str, str]) -> bool:
    """Whether the ranks have yet to find each other: no launcher brought a rendezvous server."""
    return launch.kind == "gloo" and "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in env


def process_settings(
    launch: Launch,
    parallel: ParallelConfig,
    *,
    env: Mapping[str, str],
    cores: int,
    gpus: int,
    timeline: bool = False,
) -> dict[str, str]:
    """Environment variables to set before MPI and Horovod start, where the user has not.

    Args:
        launch: this process among its peers.
        parallel: fusion, cycle time and stall limit.
        env: the environment as it is; a variable in it is left alone.
        cores: CPU cores this process may run on.
        gpus: GPUs it can see.
        timeline: whether `World.start_timeline` will be called.

    Returns:
        Variables that `env` lacks, with their values.
    """
    # Alone nothing is ever sent, and a thread that wakes each 2 ms costs a step 1.5 % (measured).
    cycle_ms = parallel.cycle_ms or (100.0 if launch.kind == "single" else 1.0 if gpus else 2.0)
    stall_s = parallel.stall_timeout_s
    # Buckets are reduced in place, one by one: fused, they would be copied, and the order of summation
    # would depend on what was ready together.
    fusion_mb = 0 if parallel.strategy in ("buckets", "zero1") else parallel.fusion_mb
    wanted = {
        CYCLE_TIME: f"{cycle_ms:g}",
        "HOROVOD_FUSION_THRESHOLD": str(fusion_mb * 2**20),
        # Horovod ignores a shutdown time below its check time.
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, min(60, stall_s // 2))),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(stall_s),
    }
    if launch.kind == "single":
        # With size 1 and the Gloo controller Horovod opens no socket and never calls MPI_Init.
        wanted |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    if timeline:
        # Horovod refuses to start one later where this was not set.
        wanted["HOROVOD_TIMELINE"] = "DYNAMIC"
    if launch.kind == "gloo":
        # It bounds start-up skew as well: rank 0 may be sharding the demo corpus.
        wanted[_GLOO_TIMEOUT] = "300"
    wanted |= _core_settings(launch, cores)
    return {name: value for name, value in wanted.items() if name not in env}


def for_many_worlds(settings: Mapping[str, str], *, size: int) -> dict[str, str]:
    """The same settings for a process that starts Horovod again and again.

    Args:
        settings: from `process_settings`.
        size: ranks of the world that comes next.
    """
    changed = {name: value for name, value in settings.items() if name != CYCLE_TIME}
    if _GLOO_TIMEOUT in changed:
        # All ranks come to the start-up at one moment. Who does not hear that a peer is gone is told by the
        # driver; this is for the case that nobody knows.
        changed[_GLOO_TIMEOUT] = str(20 + size // 8)
    # With it Horovod looks for errors of NCCL, and asks the store for its rank when it starts again.
    return changed | {"HOROVOD_ELASTIC": "1"}


def _core_settings(launch: Launch, cores: int) -> dict[str, str]:
    """How the ranks of a host share its cores."""
    if launch.kind != "single" and launch.local_size >= cores:
        # Open MPI spins while it waits; measured with 4 ranks on 2 cores: 968 ms a step, yielding 268.
        return {"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}
    return {"OMP_NUM_THREADS": str(max(1, cores // launch.local_size))} if launch.local_size > 1 else {}


def _launch(kind: Literal["mpi", "gloo"], env: Mapping[str, str], names: tuple[str, str, str, str]) -> Launch:
    rank, size = int(env[names[0]]), int(env[names[1]])
    if size == 1:
        return Launch("single")
    if names[2] in env and names[3] in env:
        return Launch(kind, rank, size, int(env[names[2]]), int(env[names[3]]))
    if "SLURM_LOCALID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) == size:
        return Launch(kind, rank, size, int(env["SLURM_LOCALID"]), local_tasks(env))
    return Launch(kind, rank, size, 0, UNKNOWN)


def local_tasks(env: Mapping[str, str]) -> int:
    """Tasks of a Slurm step on this node."""
    counts, node = tasks_of_nodes(env), int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[-1]


def tasks_of_nodes(env: Mapping[str, str]) -> list[int]:
    """Tasks of a Slurm step on each node, from its compressed list, e.g. '4(x2),3'."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts
