"""Driving a run: the server of an elastic run, and a process on each host of its own."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hvdlm.cluster.elastic.driver import Driver
from hvdlm.cluster.elastic.hosts import Hosts, own_nodes
from hvdlm.cluster.elastic.members import Policy
from hvdlm.cluster.job import job_end
from hvdlm.comm.store import own_address
from hvdlm.config import RunConfig, UserError
from hvdlm.config.parse import DEFAULT_RECIPE, folder_of, load_config
from hvdlm.corpus import demo
from hvdlm.elastic.slots import slots_of_host
from hvdlm.run import jobs
from hvdlm.run.folder import make_folder
from hvdlm.run.lease import Lease
from hvdlm.run.stop import deadline

_HOSTS_LIMIT_S = 15.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def drive(args: argparse.Namespace, train_args: list[str]) -> int:
    """Train until the run is done, stopped, or cannot go on.

    Args:
        args: slots, min_workers.
        train_args: those of `python -m hvdlm.train`.

    Returns:
        Exit code of the run.

    Raises:
        UserError: bad arguments; another start trains there; the nodes of the job are not known.
    """
    config, recipe = load_config(train_args, prog="python -m hvdlm.train")
    demo.prepare_if_asked(config.data.path, is_demo=recipe == DEFAULT_RECIPE)
    run_folder = folder_of(config, recipe)
    make_folder(run_folder)
    nodes, slots = own_nodes(os.environ), slots_of_host(args.slots, os.environ)
    lease = _take(run_folder)
    policy = Policy(min_workers=args.min_workers, first_workers=slots * max(1, len(nodes)))
    driver = Driver(
        run_folder,
        own_address(os.environ.get("SLURMD_NODENAME", nodes[0])) if nodes else "127.0.0.1",
        ["-m", "hvdlm.train", *train_args],
        policy=policy,
        job=os.environ.get("SLURM_JOB_ID", ""),
        token=lease.token,
    )
    hosts = Hosts(nodes, run_folder, slots=slots)
    limit_s = _HOSTS_LIMIT_S
    try:
        _listen(hosts)
        return driver.run(say=_say, tend=_tending(driver, hosts, stop_unix=_stop_unix(config)))
    except KeyboardInterrupt:
        limit_s = 0.0
        raise
    finally:
        hosts.close(limit_s=limit_s)
        driver.close()
        lease.release()


def _take(run_folder: Path) -> Lease:
    """The run folder for this driver; a refusal is noted for the Slurm job."""
    try:
        return Lease(run_folder)
    except UserError as error:
        jobs.note_refusal(run_folder, os.environ, exit_code=error.exit_code, error=str(error))
        raise


def _listen(hosts: Hosts) -> None:
    """A signal stops the run; a second Ctrl-C ends it at once."""

    def hear(number: int, _: object) -> None:
        if number == signal.SIGINT and hosts.stop_asked:
            raise KeyboardInterrupt
        hosts.ask_stop(f"signal {signal.Signals(number).name}")

    for number in _SIGNALS:
        signal.signal(number, hear)


def _tending(driver: Driver, hosts: Hosts, *, stop_unix: float) -> Callable[[], None]:
    def tend() -> None:
        hosts.tend(wanted=not driver.roster.stop_reason and driver.roster.end_code is None)
        driver.drain(hosts.draining)
        if stop_unix and time.time() >= stop_unix:
            hosts.ask_stop("the job's time is nearly over")
        if hosts.stop_asked:
            driver.stop(hosts.stop_asked)

    return tend


def _stop_unix(config: RunConfig) -> float:
    end = job_end(os.environ)
    if end.trouble:
        print(
            f"hvdlm elastic: warning: no end of this job known ({end.trouble})", file=sys.stderr, flush=True
        )
    return deadline(end.unix, config.train.stop_margin_s)


def _say(line: str) -> None:
    sys.stdout.write(f"hvdlm elastic: {line}\n")
    sys.stdout.flush()
