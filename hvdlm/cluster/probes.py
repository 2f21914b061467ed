"""The list of probes: each asks one thing of this machine and says how to put it right.

No probe initialises MPI or imports a foreign library in this process: what may abort or hang
is asked in a bounded child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hvdlm.cluster.finding import Finding
from hvdlm.cluster.host import probe_hdf5, probe_limits, probe_packages, probe_python, probe_space
from hvdlm.cluster.stack import probe_allreduce, probe_horovod, probe_mpi, probe_refusals, probe_slurm

PROBES: tuple[Callable[[], Iterator[Finding]], ...] = (
    probe_python,
    probe_packages,
    probe_hdf5,
    probe_horovod,
    probe_mpi,
    probe_refusals,
    probe_slurm,
    probe_space,
    probe_limits,
    probe_allreduce,
)


def findings() -> Iterator[Finding]:
    """Runs every probe.

    Yields:
        Each finding as soon as it is there; a probe that breaks is a finding too.
    """
    for probe in PROBES:
        try:
            yield from probe()
        except Exception as error:
            name = probe.__name__.removeprefix("probe_")
            found = f"{type(error).__name__}: {error}"
            yield Finding(name, "fail", found, "a probe that ends", "put right what it names")
