"""The whole preflight: every question to every node, each with a limit, within a limit for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from hvdlm.cluster.finding import Finding
from hvdlm.cluster.preflight import compare
from hvdlm.cluster.preflight.compare import Limits, NodeFinding, Values
from hvdlm.cluster.preflight.groups import Launcher, culprits
from hvdlm.cluster.preflight.line import Answer, Crew

FOLDER = "preflight"
_ASK_S = 15.0
_GPU_S = 75.0
_LATE_S = 5.0
_CLOCK_ROUNDS = 3
_LEAST_ALLREDUCE_S = 10.0


@final
@dataclass(frozen=True)
class Plan:
    """What is looked at.

    Attributes:
        nodes: their names; the first is this one.
        run_folder: of the run; a folder `preflight` is made there.
        on_node: the command that answers questions on a node.
        launcher: for the all-reduce; None = none is done.
        arguments: those of train, which every node resolves.
        limits: where good ends.
    """

    nodes: tuple[str, ...]
    run_folder: Path
    on_node: tuple[str, ...]
    launcher: Launcher | None
    arguments: tuple[str, ...]
    limits: Limits


@final
@dataclass(frozen=True)
class Check:
    """A question, what to make of the answers, and what to say where nothing is wrong with them."""

    question: str
    judge: Callable[[Values], list[NodeFinding]]
    summary: Callable[[Values], str]
    limit_s: float = _ASK_S


@final
class Preflight:
    """One preflight; `findings` grows as checks end.

    Args:
        plan: what is looked at.
        limit_s: seconds for everything.
        first_s: seconds for the first answer of a node, whose process has to be started.
    """

    def __init__(self, plan: Plan, *, limit_s: float, first_s: float) -> None:
        self.findings: list[NodeFinding] = []
        self._plan = plan
        self._first_s = first_s
        self._give_up = time.monotonic() + limit_s

    @property
    def bad(self) -> list[str]:
        """The nodes that failed something, in the order of the job."""
        named = {one.node for one in self.findings if one.finding.state == "fail"}
        return [node for node in self._plan.nodes if node in named]

    @property
    def ok(self) -> bool:
        """Nothing failed, of a node or of all together."""
        return all(one.finding.state != "fail" for one in self.findings)

    def run(self) -> Iterator[NodeFinding]:
        """Look at everything.

        Yields:
            Each finding as soon as it is there.
        """
        for one in self._everything():
            self.findings.append(one)
            yield one

    def _everything(self) -> Iterator[NodeFinding]:
        crew = Crew(self._plan.nodes, self._plan.on_node)
        try:
            hello, *others = self._checks()
            yield from self._put(crew, hello)
            yield from self._clocks(crew)
            yield from self._folder(crew)
            for check in others:
                yield from self._put(crew, check)
            yield from self._scores(crew)
        finally:
            crew.close()
        yield from self._allreduce([node for node in self._plan.nodes if node not in self.bad])

    def _checks(self) -> tuple[Check, ...]:
        limits = self._plan.limits
        return (
            Check("hello", compare.hosts, lambda v: f"{len(v)} nodes with names of their own", self._first_s),
            Check("software", compare.software, lambda v: f"code {_first(v)['code']}, the same versions"),
            Check("config", compare.configs, lambda v: f"{_first(v)['config']} everywhere"),
            Check("gpus", compare.gpus, lambda v: f"{len(_first(v)['gpus'])} on each node", _GPU_S),
            Check("links", compare.links, lambda v: f"{len(_first(v)['ports'])} port(s) on each node"),
            Check("memlock", compare.memlock, lambda v: "enough"),
            Check("space", partial(compare.space, limits=limits), lambda v: "enough space and inodes"),
            Check("load", compare.load, lambda v: "no busy process but this job's"),
        )

    def _put(self, crew: Crew, check: Check) -> Iterator[NodeFinding]:
        details = {
            "config": {"arguments": list(self._plan.arguments)},
            "space": {"folders": [str(self._plan.run_folder)]},
        }
        answers = self._ask(crew, check.question, limit_s=check.limit_s, everyone=details.get(check.question))
        yield from self._judged(check.question, answers, check.judge, summary=check.summary)

    def _judged(
        self,
        name: str,
        answers: Mapping[str, Answer],
        judge: Callable[[Values], list[NodeFinding]],
        *,
        summary: Callable[[Values], str],
    ) -> Iterator[NodeFinding]:
        values = {node: answer.value for node, answer in answers.items() if answer.value is not None}
        found = [*compare.unanswered(name, answers), *(judge(values) if values else [])]
        yield from found
        if values and not found:
            yield NodeFinding("", Finding(name, "ok", summary(values)))

    def _ask(
        self, crew: Crew, question: str, *, limit_s: float, everyone: dict[str, Any] | None = None
    ) -> dict[str, Answer]:
        details = {node: everyone or {} for node in crew.nodes}
        return crew.ask(question, limit_s=self._within(limit_s), details=details)

    def _within(self, limit_s: float) -> float:
        return max(0.1, min(limit_s, self._give_up - time.monotonic()))

    def _clocks(self, crew: Crew) -> Iterator[NodeFinding]:
        rounds = [self._ask(crew, "clock", limit_s=_ASK_S) for _ in range(_CLOCK_ROUNDS)]
        limits = self._plan.limits
        yield from self._judged(
            "clock",
            rounds[-1],
            lambda values: compare.clocks([{n: r[n] for n in values} for r in rounds], limits),
            summary=lambda v: f"within {limits.skew_s:g} s of the first node's",
        )

    def _folder(self, crew: Crew) -> Iterator[NodeFinding]:
        """Every node writes, and then looks for what others have written."""
        text = str(time.time_ns())
        where = {"folder": str(self._plan.run_folder / FOLDER / f"seen-{text}")}
        own = {node: {**where, "name": node, "text": text} for node in crew.nodes}
        written = crew.ask("write", limit_s=self._within(_ASK_S), details=own)
        yield from compare.unanswered("run folder", written)
        wrote = [node for node in crew.nodes if written[node].value is not None]
        wanted = {node: compare.neighbors(node, wrote) for node in wrote}
        looked = {
            n: {**where, "names": others, "text": text, "wait_s": _LATE_S} for n, others in wanted.items()
        }
        read = crew.ask("read", limit_s=self._within(_ASK_S + _LATE_S), details=looked)
        yield from self._judged(
            "run folder",
            read,
            lambda values: compare.folder(values, wanted),
            summary=lambda v: f"{self._plan.run_folder}: what {len(v)} node(s) write, others read",
        )
        self._ask(crew, "forget", limit_s=_ASK_S, everyone=where)

    def _scores(self, crew: Crew) -> Iterator[NodeFinding]:
        answers = self._ask(crew, "score", limit_s=_GPU_S)
        yield from self._judged(
            "score",
            answers,
            lambda values: compare.scores(values, self._plan.limits),
            summary=compare.score_text,
        )

    def _allreduce(self, nodes: list[str]) -> Iterator[NodeFinding]:
        """Over the nodes that are good so far, so that a hang has a new cause."""
        launcher = self._plan.launcher
        left_s = self._give_up - time.monotonic()
        if launcher is None or len(nodes) < 2 or left_s < _LEAST_ALLREDUCE_S:
            why = "not asked for" if launcher is None else f"{len(nodes)} good node(s), {left_s:.0f} s left"
            yield NodeFinding("", Finding("all-reduce", "skip", why))
            return
        spoken = launcher.allreduce(nodes, limit_s=left_s * 0.4)
        if spoken.trouble:
            blamed = culprits(launcher, nodes, limit_s=(self._give_up - time.monotonic()) / 2)
            yield from compare.failed_sums(spoken.trouble, blamed)
        else:
            yield from compare.sums(spoken.ranks, self._plan.limits)


def _first(values: Values) -> dict[str, Any]:
    return next(iter(values.values()))
