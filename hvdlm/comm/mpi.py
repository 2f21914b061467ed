"""MPI without Horovod, for commands that do not train: start, one agreed text, end."""

from __future__ import annotations

from typing import Any

from hvdlm.config import UserError

_TEXT_BYTES = 64


def agree(text: str, *, size: int) -> str:
    """Start MPI and take rank 0's text.

    Args:
        text: this rank's, at most 64 bytes.
        size: ranks that the launcher announced.

    Returns:
        Rank 0's text.

    Raises:
        UserError: MPI finds another number of ranks (a PMI that it cannot use makes each a world
            of its own).

    Collective: yes.
    """
    communicator = _start()
    if communicator.size != size:
        raise UserError(
            f"launch: the launcher started {size} tasks, MPI found {communicator.size} rank(s); "
            "the MPI library does not know this launcher's PMI: use mpirun, or srun --mpi=pmix"
        )
    data = bytearray(text.encode().ljust(_TEXT_BYTES))
    communicator.Bcast(data, root=0)
    return data.decode().rstrip()


def finish() -> None:
    """End MPI.

    Collective: yes.
    """
    from mpi4py import MPI

    MPI.Finalize()


def _start() -> Any:
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    return MPI.COMM_WORLD
