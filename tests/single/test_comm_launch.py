"""How a process was launched, from environments as real launchers set them."""

from __future__ import annotations

import pytest

from hvdlm.comm import world
from hvdlm.comm.launch import UNKNOWN, Launch, classify, needs_meeting, process_settings
from hvdlm.config import ParallelConfig, UserError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
GLOO = {
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
    "HOROVOD_RANK": "5",
    "HOROVOD_SIZE": "8",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch("single")),
        (OPEN_MPI, Launch("mpi", 5, 8, 1, 4)),
        (GLOO, Launch("gloo", 5, 8, 1, 4)),
        ({**SRUN, "PMIX_RANK": "5"}, Launch("mpi", 5, 8, 1, 4)),
        # srun --mpi=pmi2 names no local rank, but Slurm does; elsewhere MPI is asked.
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, Launch("mpi", 5, 8, 1, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpi", 1, 2, 0, UNKNOWN)),
        # One task under srun: MPI_Init without a PMI would abort.
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch("single")),
        # mpirun inside a Slurm step: its own variables count, not the step's one task a node.
        ({**OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2"}, Launch("mpi", 5, 8, 1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Launch("single")),
    ],
)
def test_classify(env: dict[str, str], expected: Launch) -> None:
    assert classify(env) == expected


def test_srun_without_a_pmi_has_to_meet() -> None:
    assert classify(SRUN) == Launch("gloo", 5, 8, 1, 4)
    assert needs_meeting(classify(SRUN), SRUN)
    assert not needs_meeting(classify(GLOO), GLOO)
    assert not needs_meeting(classify(OPEN_MPI), OPEN_MPI)
    with pytest.raises(UserError, match=r"8 tasks without PMIx.*srun --mpi=pmix"):
        world.init(classify(SRUN), {})


def test_uneven_nodes_know_their_own_tasks() -> None:
    env = {**SRUN, "PMIX_RANK": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}
    assert classify(env).local_size == 3


def settings(launch: Launch, cores: int, env: dict[str, str] | None = None, gpus: int = 0) -> dict[str, str]:
    return process_settings(launch, ParallelConfig(), env=env or {}, cores=cores, gpus=gpus)


def test_crowded_ranks_yield_and_take_one_thread() -> None:
    crowded = settings(Launch("mpi", 0, 4, 0, 4), cores=2)
    assert crowded["OMPI_MCA_mpi_yield_when_idle"] == crowded["OMP_NUM_THREADS"] == "1"
    roomy = settings(Launch("mpi", 0, 4, 0, 4), cores=16)
    assert "OMPI_MCA_mpi_yield_when_idle" not in roomy
    assert roomy["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in settings(Launch("single"), cores=2)


def test_an_idle_horovod_does_not_wake_all_the_time() -> None:
    assert settings(Launch("single"), cores=2)["HOROVOD_CYCLE_TIME"] == "100"
    assert settings(Launch("mpi", 0, 2, 0, 2), cores=2)["HOROVOD_CYCLE_TIME"] == "2"
    assert settings(Launch("mpi", 0, 2, 0, 2), cores=2, gpus=2)["HOROVOD_CYCLE_TIME"] == "1"


def test_what_the_user_has_set_stays() -> None:
    env = {"OMP_NUM_THREADS": "7", "HOROVOD_CYCLE_TIME": "9"}
    assert not env.keys() & settings(Launch("mpi", 0, 4, 0, 4), cores=2, env=env).keys()


def test_a_stall_ends_the_job_after_its_warning() -> None:
    found = settings(Launch("mpi", 0, 2, 0, 2), cores=2)
    check_s, shutdown_s = (int(found[f"HOROVOD_STALL_{name}_TIME_SECONDS"]) for name in ("CHECK", "SHUTDOWN"))
    assert 0 < check_s < shutdown_s == 600


def test_a_single_process_never_touches_mpi() -> None:
    found = settings(Launch("single"), cores=2)
    assert found["HOROVOD_CONTROLLER"] == found["HOROVOD_CPU_OPERATIONS"] == "gloo"
    assert "HOROVOD_CONTROLLER" not in settings(Launch("mpi", 0, 2, 0, 2), cores=2)
