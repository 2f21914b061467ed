"""Taking part in a run: this host waits for its driver, and runs workers for it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hvdlm.cluster.elastic.agent import Agent
from hvdlm.cluster.job import job_end
from hvdlm.config import EXIT_DONE, EXIT_REQUEUE, UserError
from hvdlm.elastic.slots import slots_of_host
from hvdlm.run.retry import what_forbids

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 1.0
_MARGIN_S = 60.0


def join(args: argparse.Namespace) -> int:
    """Serve drivers of a run, one after another, until the run is over.

    Returns:
        EXIT_DONE where the run was done or let this host go; EXIT_REQUEUE where no driver came at all; else
        what a job ends with that should not train (`run.retry`): somebody wants the run to rest, say.

    Raises:
        UserError: there is no such run folder, and none was made while this host waited.
    """
    run_folder = Path(args.join)
    if not run_folder.is_dir():
        # A donor's job may begin before the driver's.
        print(f"hvdlm elastic: {run_folder} is not there; waiting for its driver", flush=True)
    heard: list[str] = []
    for number in _SIGNALS:
        signal.signal(number, lambda n, _: heard.append(f"signal {signal.Signals(n).name}"))
    leave_unix = _leave_unix()
    host = args.host or os.environ.get("SLURMD_NODENAME", "") or os.uname().nodename
    agent = Agent(
        run_folder,
        host=host,
        slots=slots_of_host(args.slots, os.environ),
        job=os.environ.get("SLURM_JOB_ID", ""),
    )

    def wants_to_leave() -> str:
        late = leave_unix and time.time() >= leave_unix
        return heard[0] if heard else "the job's time is nearly over" if late else ""

    try:
        return _serve(agent, run_folder, wait_s=args.wait_s, wants_to_leave=wants_to_leave)
    finally:
        agent.close()


def _serve(agent: Agent, run_folder: Path, *, wait_s: float, wants_to_leave: Callable[[], str]) -> int:
    begun_unix, heard_s, served = time.time(), time.monotonic(), False
    while True:
        if agent.serve(wants_to_leave):
            heard_s, served = time.monotonic(), True
        if agent.leaving or wants_to_leave():
            return EXIT_DONE
        # How many steps there are to be is for the driver's next job to know.
        forbids = what_forbids(run_folder, steps=0, submitted_unix=begun_unix)
        if forbids:
            return forbids.exit_code
        if time.monotonic() - heard_s >= wait_s:
            if not run_folder.is_dir():
                raise UserError(
                    f"{run_folder}: no run folder; needed that of python -m hvdlm.elastic, which makes it"
                )
            return EXIT_DONE if served else EXIT_REQUEUE
        time.sleep(_POLL_S)


def _leave_unix() -> float:
    end = job_end(os.environ)
    if end.trouble:
        print(
            f"hvdlm elastic: warning: no end of this job known ({end.trouble})", file=sys.stderr, flush=True
        )
    return end.unix - _MARGIN_S if end.unix else 0.0
