"""How ranks of one Slurm step find each other without MPI: a key-value store that rank 0 serves.

The address and the key of the store lie in a file that only its owner can read.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.comm.launch import Launch, tasks_of_nodes
from hvdlm.comm.store import Store, own_address
from hvdlm.config import UserError

WAIT_S = 300.0
_POLL_S = 0.1


def meet(launch: Launch, folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Serve the store (rank 0) or find it, and say what Horovod needs to know of it.

    The store lives as long as rank 0's process.

    Args:
        launch: this process among the tasks of its step.
        folder: one that all of them see; made where missing.
        env: the environment, for the step's name and this node's.

    Returns:
        Environment variables for Horovod.

    Raises:
        UserError: the folder cannot be written, or rank 0 is not heard of for five minutes.

    Collective: yes.
    """
    step = ".".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    path = folder / f".rendezvous-{step}"
    if launch.rank == 0:
        told = _serve(env)
        write_told(path, told)
    else:
        told = _wait_for(path)
    across = _across(launch, env)
    return gloo_settings(launch, place=f"{told['place']}/0", host=socket.gethostname(), across=across)


def gloo_settings(launch: Launch, *, place: str, host: str, across: tuple[int, int]) -> dict[str, str]:
    """Environment variables by which Horovod's Gloo controller finds the other ranks.

    Args:
        launch: this process.
        place: "IP:PORT/KEY" of a `Store`, and after another slash what all ranks of this world have in
            common with no other.
        host: name of this host, the same for its ranks alone.
        across: this rank among those of its local rank, and how many there are.
    """
    port = place.partition("/")[0].rpartition(":")[2]
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        # Horovod appends ":PORT/SCOPE/KEY" to what it takes for an address.
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": place,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_HOSTNAME": host,
        "HOROVOD_RANK": str(launch.rank),
        "HOROVOD_SIZE": str(launch.size),
        "HOROVOD_LOCAL_RANK": str(launch.local_rank),
        "HOROVOD_LOCAL_SIZE": str(launch.local_size),
        "HOROVOD_CROSS_RANK": str(across[0]),
        "HOROVOD_CROSS_SIZE": str(across[1]),
    }


def forget(folder: Path) -> None:
    """Remove the files of steps that have met; for rank 0, once all are there."""
    for path in folder.glob(".rendezvous-*"):
        path.unlink(missing_ok=True)


def _across(launch: Launch, env: Mapping[str, str]) -> tuple[int, int]:
    """The ranks of this local rank, one a node that has so many tasks: nodes may have different numbers."""
    nodes = [node for node, tasks in enumerate(tasks_of_nodes(env)) if tasks > launch.local_rank]
    return nodes.index(int(env.get("SLURM_NODEID", "0"))), len(nodes)


def _serve(env: Mapping[str, str]) -> dict[str, Any]:
    alone = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    name = env.get("SLURMD_NODENAME", socket.gethostname())
    return {"place": Store("127.0.0.1" if alone else own_address(name)).place}


def write_told(path: Path, told: Mapping[str, Any]) -> None:
    """Write what only the owner's processes may read, and put it into its place.

    Raises:
        UserError: the file system refuses.
    """
    temp = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(told))
        temp.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another folder") from error


def _wait_for(path: Path) -> dict[str, Any]:
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        try:
            told: dict[str, Any] = json.loads(path.read_text())
            return told
        except OSError:
            time.sleep(_POLL_S)
    raise UserError(
        f"{path}: rank 0 did not write it within {WAIT_S:.0f} s; is the folder shared by all nodes?"
    )
