"""A real all-reduce over two ranks: the one check that exercises launcher, MPI and Horovod together."""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
from pathlib import Path

from hvdlm.cluster.bounded import Outcome, run_bounded

RANK_LIMIT_S = 60.0


def rank_allreduce(expected_size: int) -> int:
    """Sums rank + 1 over all ranks and compares with the arithmetic; prints one line a rank.

    Collective: every rank of the job calls it.

    Args:
        expected_size: Number of ranks the launcher was asked for.

    Returns:
        Exit status: 0 where size and sum are right.
    """
    # Ends the process even where it is stuck inside MPI; no signal handler could.
    faulthandler.dump_traceback_later(RANK_LIMIT_S, exit=True)
    import horovod.torch as hvd
    import torch

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    total = hvd.allreduce(torch.full((1000,), rank + 1.0), op=hvd.Sum, name="hvdlm.doctor.allreduce")
    needed = size * (size + 1) / 2
    ok = size == expected_size and bool((total == needed).all())
    print(
        f"all-reduce {'ok' if ok else 'error'}: {rank_line(rank, size)}, sum {total[0].item():g}", flush=True
    )
    if size != expected_size:
        print(
            f"error: found {size} ranks, needed {expected_size}: Horovod was built for another MPI"
            " than this launcher's; run ./install.sh",
            file=sys.stderr,
        )
    hvd.shutdown()
    return 0 if ok else 1


def rank_line(rank: int, size: int) -> str:
    """How a rank names itself in the output."""
    return f"rank {rank} of {size}"


def launch_allreduce(launcher: list[str], ranks: int = 2) -> Outcome:
    """Runs the all-reduce under a launcher, such as `["mpirun", "-np", "2"]`, with a hard time limit.

    Returns:
        The outcome; its status is 0 only where every rank reported the right sum.
    """
    command = [*launcher, sys.executable, "-m", "hvdlm.doctor", "--allreduce", str(ranks)]
    env = {"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    outcome = run_bounded(command, limit_s=RANK_LIMIT_S + 15, more_env=env)
    said = all(f"ok: {rank_line(rank, ranks)}" in outcome.output for rank in range(ranks))
    if outcome.code == 0 and not said:
        return Outcome(None, outcome.output, "a rank reported nothing")
    return outcome


def find_program(name: str) -> str | None:
    """A program on PATH, else beside this interpreter; None where it is in neither place."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if os.access(beside, os.X_OK) else None)
