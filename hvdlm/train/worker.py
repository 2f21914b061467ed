"""A worker of an elastic run: world after world, until the run or this worker's part in it is over."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from hvdlm.cluster.elastic.horovod_member import HorovodMember, is_under_horovod
from hvdlm.comm import launch, world
from hvdlm.comm.member import ELASTIC, WORKER, DriverGoneError, Member, read_told
from hvdlm.comm.sockets import open_sockets, opened_since
from hvdlm.comm.world import AgreedError, LostPeerError, World
from hvdlm.config import EXIT_DONE, EXIT_REQUEUE, RunConfig, UserError, total_steps
from hvdlm.run import crash, stop
from hvdlm.run.lease import BorrowedLease
from hvdlm.train.agree import Agreed, agree_on_start
from hvdlm.train.carry import Carry, Elastic, Places
from hvdlm.train.loop import train
from hvdlm.train.session import Session, open_session

_STRATEGIES = ("allreduce", "buckets", "zero1", "fixed")

Leave = Callable[[Agreed, World], int]


def is_wanted() -> bool:
    """Whether an elastic driver started this process, ours or Horovod's."""
    return ELASTIC in os.environ or is_under_horovod(os.environ)


def join() -> tuple[Places, str]:
    """Tell the driver that this worker is there, before it has read anything.

    Returns:
        The way to the driver, and the token of its lease; '' where it holds none.

    Raises:
        UserError: it is gone.
    """
    if ELASTIC not in os.environ:
        return HorovodMember(os.environ), ""
    path = Path(os.environ[ELASTIC])
    try:
        told = read_told(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no elastic driver is there any more; start python -m hvdlm.elastic"
        ) from error
    for number in stop.SIGNALS:
        # Also between worlds; see `Member.signals`.
        signal.signal(number, lambda *_: None)
    return Member(told, os.environ[WORKER]), told["token"]


def check_elastic(config: RunConfig) -> None:
    """Refuse what an elastic run cannot do.

    Raises:
        UserError: the strategy keeps its state in torch's process group, or Horovod's timeline is wanted.
    """
    if config.log.timeline:
        raise UserError("log.timeline true: not in an elastic run, in which Horovod starts again and again")
    if config.parallel.strategy not in _STRATEGIES:
        raise UserError(
            f"parallel.strategy {config.parallel.strategy}: an elastic run needs one of "
            f"{', '.join(_STRATEGIES)}; torch's process group cannot change"
        )


@final
class Worker:
    """One process of an elastic run.

    Args:
        config: of the run.
        run_folder: of the run.
        member: the way to the driver.
        token: of the driver's lease; '' = each world's rank 0 takes one of its own.
        finished: says that the run was done before; given what was agreed, and the ranks.
    """

    def __init__(
        self, config: RunConfig, run_folder: Path, member: Places, *, token: str, finished: Leave
    ) -> None:
        self._config = config
        self._run_folder = run_folder
        self._member = member
        self._lease = BorrowedLease(run_folder, token) if token else None
        self._finished = finished
        self._session: Session | None = None
        self._lost = False
        # What rank 0 took along, until the next world has it.
        self._carry: Carry | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def run(self) -> int:
        """Train in every world that there is a place in.

        Returns:
            Exit code: EXIT_DONE also where this worker left and the run goes on.
        """
        try:
            while place := self._member.next_place(self._step_in_memory(), lost=self._lost):
                code = self._in_world(place)
                if code is not None:
                    return code
        except DriverGoneError:
            print("hvdlm train: the elastic driver is gone", file=sys.stderr, flush=True)
            return EXIT_REQUEUE
        return EXIT_DONE

    def _step_in_memory(self) -> int:
        """The last step whose whole result this process holds; -1 = none."""
        s = self._session
        if s and s.strategy.whole() is not None:
            return s.progress.step
        return self._carry.progress.step if self._carry else -1

    def _in_world(self, place: dict[str, Any]) -> int | None:
        """Train in one world; None where there may be another."""
        self._take_along(place)
        if not self._member.wait_for_others():
            self._lost = True
            return None
        before = open_sockets()
        ranks = world.init(*self._launch(place))
        self._member.hang_up_if_broken(opened_since(before))
        self._lost, attempt, code, agreed = False, 0, None, None
        try:
            agreed = agree_on_start(
                self._config, self._run_folder, ranks, lease=self._lease, carry=self._carry
            )
            if agreed.start.step >= total_steps(self._config) or agreed.start.course.plateau.finished:
                code = self._finished(agreed, ranks)
                agreed.close()
            else:
                attempt = agreed.start.attempt
                crash.end_job_on_thread_errors(ranks, self._run_folder, attempt)
                elastic = Elastic(self._member, self._tensors)
                self._session = open_session(self._config, self._run_folder, ranks, agreed, elastic=elastic)
                self._carry, self._tensors = None, {}
                code = train(self._session)
                if code is None:
                    self._session.close()
        except LostPeerError:
            self._leave_broken_world(agreed)
        except AgreedError as error:
            crash.leave_together("train", error, ranks, run_folder=self._run_folder, attempt=attempt)
            code = error.exit_code
        except BaseException as error:
            folder = self._run_folder if attempt else None
            crash.end_job("train", error, ranks, run_folder=folder, attempt=attempt)
        ranks.close()
        return code

    def _take_along(self, place: dict[str, Any]) -> None:
        """Copy what rank 0 gives to all; on the others, and where a world begins at a checkpoint, nothing.

        A model and its strategy live for one world, so they go before those of the next are built.
        """
        s, self._session = self._session, None
        gives = place["rank"] == 0 and place["step"] >= 0
        if s and gives:
            self._carry = Carry(s.agreed.start, s.progress)
            whole = s.strategy.whole() or {}
            self._tensors = {name: values.detach().cpu().clone() for name, values in whole.items()}
        elif not gives:
            self._carry, self._tensors = None, {}
        del s
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _launch(self, place: dict[str, Any]) -> tuple[launch.Launch, dict[str, str]]:
        here, settings = self._member.settings(place)
        # As `for_many_worlds` drops it from ours.
        os.environ.pop(launch.CYCLE_TIME, None)
        wanted = launch.process_settings(
            here,
            self._config.parallel,
            env=os.environ,
            cores=len(os.sched_getaffinity(0)),
            gpus=torch.cuda.device_count(),
        )
        return here, launch.for_many_worlds(wanted, size=here.size) | settings

    def _leave_broken_world(self, agreed: Agreed | None) -> None:
        """Another rank is gone, and with it what was under way."""
        s, self._lost = self._session, True
        if s is None:
            print("hvdlm train: a rank was lost before the first step", file=sys.stderr, flush=True)
            if agreed:
                agreed.close()
            return
        where = f"hvdlm train: after step {s.progress.step}"
        if s.ranks.is_root:
            print(f"{where}: a rank was lost; the others go on", file=sys.stderr, flush=True)
        s.close()
