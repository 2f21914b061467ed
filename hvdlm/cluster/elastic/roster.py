"""Who takes part in an elastic run, and which world it should have: decisions alone, no clock, no socket.

Agents, one a host, report the workers they run; workers report whether they train or wait. A world is
formed when everyone who is to be in it waits, so all of them start Horovod at the same moment: its
start-up ends a process that waits for a late one too long.
"""

from __future__ import annotations

from typing import Any, final

from hvdlm.cluster.elastic.members import Agent, Policy, Worker, place_of, ranked
from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_REQUEUE, EXIT_USAGE

_ENDS = (EXIT_DONE, EXIT_USAGE, EXIT_REQUEUE, EXIT_NO_PROGRESS)


@final
class Roster:
    """The state of an elastic run as its driver knows it.

    Args:
        policy: limits.
        job: the driver's own job; a host of another one may leave, a wish of its own stops the run.
        now_s: seconds of a monotonic clock, here and in every method.

    Attributes:
        generation: number of the present world; 0 = none was formed yet.
        stop_reason: why the run is to stop; empty = it is not.
        end_code: how the run ended; None = it goes on.
        news: lines for the user since they were last taken.
    """

    def __init__(self, policy: Policy, *, job: str, now_s: float) -> None:
        self.generation = 0
        self.stop_reason = ""
        self.end_code: int | None = None
        self.news: list[str] = []
        self.agents: dict[str, Agent] = {}
        self.workers: dict[str, Worker] = {}
        self._policy = policy
        self._job = job
        self._began_s = now_s
        self._members: list[str] = []
        self._failed_generation = -1
        self._failures = 0
        self._failure_step = -1

    def stop(self, reason: str) -> None:
        """Ask all workers to save and leave."""
        if not self.stop_reason:
            self.stop_reason = reason
            self.news.append(f"stopping: {reason}")

    def drain(self, hosts: set[str], why: str) -> None:
        """Hosts that should go, where others stay."""
        for agent in self.agents.values():
            if agent.host in hosts and not agent.leaving and self._others_than({agent.host}):
                agent.leaving = why
                self.news.append(f"host {agent.host} leaves: {why}")

    def hear_agent(self, message: dict[str, Any], now_s: float) -> dict[str, Any]:
        """A sign of life of a host, and what it is to run.

        Args:
            message: `agent` its name, `host`, `slots`, `job`, `leaving` why it must go soon (or ''), and
                `exited`: exit codes of workers by name.

        Returns:
            `run`: names of all workers that are to be alive there; `end`: it may go.
        """
        name = message["agent"]
        agent = self.agents.get(name)
        if agent is None:
            agent = self.agents[name] = Agent(name, message["host"], message["slots"], message["job"])
            self.news.append(f"host {agent.host} joins with {agent.slots} worker(s)")
        agent.heard_s = now_s
        if message["leaving"] and not agent.leaving:
            self._leaves(agent, message["leaving"])
        for worker, code in message["exited"].items():
            self._exited(worker, code, now_s)
        if not (agent.leaving or self.stop_reason or self.end_code is not None):
            self._fill(agent, now_s)
        runs = [w.name for w in self.workers.values() if w.agent is agent]
        ends = not runs and (self.end_code is not None or bool(agent.leaving))
        if ends:
            del self.agents[name]
        return {"run": runs, "end": ends}

    def hear_worker(self, message: dict[str, Any], now_s: float) -> dict[str, Any]:
        """A sign of life of a worker, and what it is to do.

        Args:
            message: `worker` its name, `generation` the last world it had a place in, `prepared` whether it
                is about to start Horovod there, `lost` whether that world broke, `waiting` whether it wants
                the next one, and `step` that its memory holds (-1 = none).

        Returns:
            `place` in the next world or None, `go`: all are prepared, `resize`: leave this world after the
            present step, `broken`: another rank of it is gone, `stop`: why all save and leave (or ''),
            `leave`: end now.
        """
        worker = self.workers.get(message["worker"])
        if worker is None:
            return {"place": None, "stop": "", "leave": True}
        if message["waiting"] and not worker.waiting:
            worker.ready_s = now_s
        worker.heard_s, worker.waiting = now_s, message["waiting"]
        worker.generation, worker.lost = message["generation"], message["lost"]
        worker.prepared, worker.step = message["prepared"], message["step"]
        self.look(now_s)
        worker.dismissed = worker.dismissed or self._must_go(worker)
        return {
            "place": self._place(worker),
            "go": all(w.prepared and w.generation == self.generation for w in self._alive_members()),
            "resize": self._wants_resize(now_s),
            "broken": self._is_broken() and worker.generation == self.generation,
            "stop": self.stop_reason,
            "leave": worker.dismissed,
        }

    def look(self, now_s: float) -> None:
        """Drop who is silent, and form a world where it is time."""
        limits = self._policy.agent_silent_s, self._policy.worker_silent_s
        agent_silent_s, worker_silent_s = self._policy.broken_silent_s if self._is_broken() else limits
        for agent in list(self.agents.values()):
            if now_s - agent.heard_s > agent_silent_s:
                self._lose_agent(agent, now_s)
        for worker in list(self.workers.values()):
            if worker.heard_s and now_s - worker.heard_s > worker_silent_s:
                self.news.append(f"worker {worker.name} is silent, and given up")
                self._lose(worker, now_s)
        if self.stop_reason and not self.workers and self.end_code is None:
            self.end_code = EXIT_REQUEUE
        if self._is_time(now_s):
            self._form()

    def _alive_members(self) -> list[Worker]:
        return [self.workers[name] for name in self._members if name in self.workers]

    def _is_busy(self, worker: Worker) -> bool:
        """It is in the present world, or on its way there."""
        if worker.name not in self._members:
            return False
        return not (worker.waiting and (self._is_broken() or worker.generation == self.generation))

    def _is_broken(self) -> bool:
        """A rank of the present world is gone, as far as this, or another rank of it, knows."""
        members = self._alive_members()
        missing = len(members) < len(self._members)
        return missing or any(w.lost and w.generation == self.generation for w in members)

    def _must_go(self, worker: Worker) -> bool:
        unwanted = bool(worker.agent.leaving) or self.end_code is not None
        unwanted = unwanted or (self.stop_reason != "" and not self._holds_work())
        return unwanted and worker.waiting and not self._is_busy(worker)

    def _holds_work(self) -> bool:
        """Whether steps that may be on no disk are in some memory that is to stay."""
        return any(w.step >= 0 for w in self._wanted())

    def _wanted(self) -> list[Worker]:
        return [w for w in self.workers.values() if not w.agent.leaving and not w.dismissed]

    def _is_time(self, now_s: float) -> bool:
        """Whether a world can be formed: nobody is in one, and who is to be in it waits."""
        if self.end_code is not None or (self.stop_reason and not self._holds_work()):
            return False
        if any(self._is_busy(worker) for worker in self.workers.values()):
            return False
        wanted = self._wanted()
        waiting = [w for w in wanted if w.waiting]
        if len(waiting) < max(1, self._policy.min_workers):
            return False
        if self.generation == 0 and now_s - self._began_s < self._policy.start_wait_s:
            return len(waiting) >= max(self._policy.first_workers, len(wanted))
        return True

    def _wants_resize(self, now_s: float) -> bool:
        """Whether the present world should end: somebody waits for the next, or must go from this one."""
        members = self._alive_members()
        if any(w.agent.leaving for w in members) or self._is_broken():
            return True
        joiners = [w for w in self._wanted() if w.waiting and w.name not in self._members]
        return bool(joiners) and now_s - max(w.ready_s for w in joiners) >= self._policy.settle_s

    def _form(self) -> None:
        self.generation += 1
        order = ranked(w for w in self._wanted() if w.waiting)
        self._members = [w.name for w in order]
        source = f"step {order[0].step} in memory" if order[0].step >= 0 else "the newest checkpoint"
        hosts = len({w.agent.name for w in order})
        self.news.append(f"world {self.generation}: {len(order)} worker(s) on {hosts} host(s), from {source}")

    def _place(self, worker: Worker) -> dict[str, Any] | None:
        members = self._alive_members()
        if worker not in members or not worker.waiting or worker.generation == self.generation:
            return None
        # Where one was lost before all had come, another world has to be formed.
        if self._is_broken():
            return None
        return place_of(worker, members) | {"generation": self.generation}

    def _leaves(self, agent: Agent, why: str) -> None:
        """A host must go: the others go on, where there are others."""
        agent.leaving = why
        if (agent.job and agent.job == self._job) or not self._others_than({agent.host}):
            # The whole job is ending, or nobody is left to remember what is on no disk.
            self.stop(f"{why} on {agent.host}")
        else:
            self.news.append(f"host {agent.host} leaves: {why}")

    def _others_than(self, hosts: set[str]) -> bool:
        """Whether some host of the present world is to stay."""
        return any(not w.agent.leaving and w.agent.host not in hosts for w in self._alive_members())

    def _fill(self, agent: Agent, now_s: float) -> None:
        """Have a worker started in each slot that has none."""
        taken = {w.slot for w in self.workers.values() if w.agent is agent}
        if now_s < agent.not_before_s:
            return
        for slot in range(agent.slots):
            if slot not in taken:
                agent.started += 1
                name = f"{agent.name}.{slot}.{agent.started}"
                self.workers[name] = Worker(name, agent, slot)

    def _exited(self, name: str, code: int, now_s: float) -> None:
        worker = self.workers.get(name)
        if worker is None:
            return
        if worker.dismissed:
            del self.workers[name]
        elif worker.name in self._members and code in _ENDS:
            # All ranks agree before one leaves like that.
            del self.workers[name]
            self.end_code = code if self.end_code is None else self.end_code
        elif self.stop_reason or self.end_code is not None:
            del self.workers[name]
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.news.append(f"worker {name} on {worker.agent.host} ended with {how}")
            alone = len(self.workers) == 1 and code in _ENDS
            self._lose(worker, now_s)
            if alone and self.end_code is None:
                self.end_code = code

    def _lose_agent(self, agent: Agent, now_s: float) -> None:
        self.news.append(f"host {agent.host} is lost")
        for worker in [w for w in self.workers.values() if w.agent is agent]:
            self._lose(worker, now_s)
        del self.agents[agent.name]

    def _lose(self, worker: Worker, now_s: float) -> None:
        """Take a dead worker off; its slot is filled again after a while, which grows."""
        del self.workers[worker.name]
        agent = worker.agent
        if now_s >= agent.not_before_s:
            agent.strikes += 1
            agent.not_before_s = now_s + min(
                self._policy.longest_wait_s, self._policy.first_wait_s * 2 ** (agent.strikes - 1)
            )
        if worker.name in self._members and self.generation != self._failed_generation:
            self._failed_generation = self.generation
            self._count_failure()

    def _count_failure(self) -> None:
        """End a run that fails again and again at the same step."""
        step = max((w.step for w in self.workers.values()), default=-1)
        self._failures = 1 if step > self._failure_step else self._failures + 1
        self._failure_step = max(step, self._failure_step)
        if self._failures >= self._policy.most_failures:
            self.news.append(f"{self._failures} worlds failed in a row without a new step")
            self.end_code = EXIT_CRASH
