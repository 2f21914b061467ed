"""The `ranks` marker and the data that several tests train on.

`@pytest.mark.ranks(2, 3)` runs a test under mpiexec once for each number of ranks: the parent
starts `mpiexec -n N python -m pytest FILE::TEST` in a session of its own with a time limit and never
imports MPI; in a rank, the first failure is printed and ends all ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests import helpers

RANK_LIMIT_S = 120
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # `command &` in a shell without job control: what is started here would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
IN_RANK = "HVDLM_TEST_RANKS" in os.environ


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker:
        metafunc.parametrize("ranks", marker.args)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if IN_RANK or not pyfuncitem.get_closest_marker("ranks"):
        return None
    ranks = pyfuncitem.callspec.params["ranks"]
    # Each rank has a temporary folder of its own: pytest cleans up behind its sessions.
    pytest_run = 'exec "$0" -m pytest -q -x -p no:cacheprovider --basetemp "$1/$OMPI_COMM_WORLD_RANK" "$2"'
    command = ["mpiexec", "-n", str(ranks), *helpers.MPI_OPTIONS, "sh", "-c", pytest_run, sys.executable]
    env = {"HVDLM_TEST_RANKS": str(ranks)}
    with (
        tempfile.TemporaryDirectory() as folder,
        helpers.started([*command, folder, pyfuncitem.nodeid], env, pyfuncitem.config.rootpath) as process,
    ):
        try:
            output, _ = process.communicate(timeout=RANK_LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{ranks} ranks were not done after {RANK_LIMIT_S} s", pytrace=False)
    if process.returncode:
        pytest.fail(f"on {ranks} ranks:\n{output}", pytrace=False)
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    if IN_RANK and report.failed:
        print(f"rank {os.environ.get('OMPI_COMM_WORLD_RANK')}: {report.longreprtext}", flush=True)
        from mpi4py import MPI

        if MPI.Is_initialized():
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)


@pytest.fixture
def world(ranks: int) -> Generator[Any, None, None]:
    """The world of a test with the `ranks` marker; None in the parent, which runs no such test."""
    if not IN_RANK:
        yield None
        return
    from hvdlm.comm import launch
    from hvdlm.comm import world as worlds
    from hvdlm.config import ParallelConfig

    here = launch.classify(os.environ)
    # Without fusion, which buckets need; a group of tensors is fused all the same.
    settings = launch.process_settings(
        here, ParallelConfig(strategy="buckets"), env=os.environ, cores=1, gpus=0
    )
    world = worlds.init(here, settings)
    yield world
    world.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set made by the real preprocess command."""
    return helpers.preprocess_tiny(tmp_path_factory.mktemp("data"))
