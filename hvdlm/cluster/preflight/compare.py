"""What the answers of all nodes say together: each function is one check, and names the nodes that fail it.

Where nobody can know what is right, most of the nodes are believed, and of equally many those with the
first node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar, final

from hvdlm.cluster.finding import Finding, State
from hvdlm.cluster.preflight.line import Answer

Values = Mapping[str, dict[str, Any]]
Key = TypeVar("Key", bound=Hashable)
_GIB = 2**30
_NEIGHBORS = 8


@final
@dataclass(frozen=True)
class NodeFinding:
    """A finding about one node, or about all of them together where `node` is empty."""

    node: str
    finding: Finding


@final
@dataclass(frozen=True)
class Limits:
    """Where good ends.

    Attributes:
        skew_s: seconds that a clock may differ from the first node's.
        free_gib: space that run folder and temporary folder need.
        slow: a node with less than this share of the median is slow; 0 = none is.
    """

    skew_s: float = 2.0
    free_gib: float = 5.0
    slow: float = 0.5


def odd_ones_out(values: Mapping[str, Key]) -> tuple[Key, list[str]]:
    """The value that most nodes have, and the nodes that have another."""
    # Counter keeps the order of first appearance among equals.
    needed = Counter(values.values()).most_common(1)[0][0]
    return needed, [node for node, value in values.items() if value != needed]


def hosts(values: Values) -> list[NodeFinding]:
    """No two nodes may have one host name: ranks would be counted as of one node, and fight for its GPUs."""
    count = Counter(value["host"] for value in values.values())
    fix = "give each node a host name of its own, or leave one of them out: sbatch --exclude=NODE"
    return [
        _bad(node, "host name", f"{value['host']}, as {count[value['host']] - 1} more", "its own", fix)
        for node, value in values.items()
        if count[value["host"]] > 1
    ]


def clocks(rounds: list[Mapping[str, Answer]], limits: Limits) -> list[NodeFinding]:
    """Clocks against this host's, by the quickest of several answers.

    Source: RFC 5905, section 8: the offset lies within half of the round trip around the middle.
    """
    found = []
    for node in rounds[-1]:
        answers = [answers[node] for answers in rounds if node in answers]
        best = min(answers, key=lambda answer: answer.received_unix - answer.sent_unix)
        assert best.value
        offset_s = best.value["unix"] - (best.sent_unix + best.received_unix) / 2
        doubt_s = (best.received_unix - best.sent_unix) / 2
        if abs(offset_s) - doubt_s > limits.skew_s:
            off = f"{abs(offset_s):.1f} s {'ahead' if offset_s > 0 else 'behind'} (known to {doubt_s:.2f} s)"
            fix = "have its time service (chrony, ntpd) put right"
            found.append(_bad(node, "clock", off, f"within {limits.skew_s:g} s of the first node's", fix))
    return found


def software(values: Values) -> list[NodeFinding]:
    """One code and one set of versions everywhere."""
    found = []
    for key in next(iter(values.values())):
        if key == "folder":
            continue
        needed, odd = odd_ones_out({node: value[key] for node, value in values.items()})
        name = "code" if key == "code" else f"version of {key}"
        for node in odd:
            where = f"{values[node][key]} in {values[node]['folder']}" if key == "code" else values[node][key]
            fix = "use one environment on a shared file system, or copy it to the nodes again"
            found.append(_bad(node, name, where, f"{needed}, as most nodes have", fix))
    return found


def configs(values: Values) -> list[NodeFinding]:
    """One resolved configuration everywhere."""
    needed, odd = odd_ones_out({node: value["config"] for node, value in values.items()})
    fix = "give a file of --config that all nodes see with the same content"
    return [
        _bad(node, "config", values[node]["config"], f"{needed}, as most nodes have", fix) for node in odd
    ]


def gpus(values: Values) -> list[NodeFinding]:
    """As many GPUs of the same kind everywhere, and none that has lost memory contents."""
    fix = "leave the node out and tell your site: sbatch --exclude=NODE"
    found = []
    for node, value in values.items():
        if value["trouble_found"]:
            found.append(_bad(node, "gpus", value["trouble_found"], "nvidia-smi to answer", fix))
        for index, gpu in enumerate(value["gpus"]):
            if gpu["errors"].isdigit() and int(gpu["errors"]):
                text = f"GPU {index}: {gpu['errors']} uncorrectable ECC errors"
                found.append(_bad(node, "gpus", text, "none", fix))
    named = {one.node for one in found}
    kinds = {
        n: tuple((g["name"], g["driver"]) for g in v["gpus"]) for n, v in values.items() if n not in named
    }
    if not kinds:
        return found
    needed, odd = odd_ones_out(kinds)
    return found + [_bad(n, "gpus", _gpu_text(kinds[n]), _gpu_text(needed), fix) for n in odd]


def _gpu_text(kinds: tuple[tuple[str, str], ...]) -> str:
    count = Counter(f"{name} (driver {driver})" for name, driver in kinds)
    return ", ".join(f"{many} x {name}" for name, many in count.items()) or "none"


def links(values: Values) -> list[NodeFinding]:
    """The active ports of each node's fabric, with their rates; a port that is down everywhere is unused."""

    def active(value: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        return tuple((name, p["rate"]) for name, p in value["ports"].items() if p["state"] == "ACTIVE")

    def text(ports: tuple[tuple[str, str], ...]) -> str:
        return ", ".join(f"{name} at {rate}" for name, rate in ports) or "no active port"

    ports = {node: active(value) for node, value in values.items()}
    needed, odd = odd_ones_out(ports)
    fix = "leave the node out and tell your site: sbatch --exclude=NODE"
    return [_bad(node, "fabric", text(ports[node]), text(needed), fix) for node in odd]


def space(values: Values, limits: Limits) -> list[NodeFinding]:
    """Room to write, everywhere."""
    found = []
    for node, value in values.items():
        for folder, free in value["folders"].items():
            fix = f"free space in {folder}, or choose another file system by train.out or TMPDIR"
            if free["bytes"] < limits.free_gib * _GIB:
                gib = f"{free['bytes'] / _GIB:.1f} GiB in {folder}"
                found.append(_bad(node, "free space", gib, f"{limits.free_gib:g} GiB", fix))
            if 0 <= free["inodes"] < 1000:
                inodes = f"{free['inodes']} files more in {folder}"
                found.append(_bad(node, "free inodes", inodes, "1000", fix))
    return found


def memlock(values: Values) -> list[NodeFinding]:
    """Locked memory, where there is a fabric that pins its buffers."""
    fix = "ask your site for 'memlock unlimited' in limits.conf and LimitMEMLOCK=infinity for slurmd"
    bad = [node for node, value in values.items() if value["fabric"] and value["bytes"] >= 0]
    return [_bad(n, "memlock", f"{values[n]['bytes'] >> 10} KiB", "unlimited", fix) for n in bad]


def load(values: Values) -> list[NodeFinding]:
    """What earlier or other jobs left running: a warning, as nodes may be shared on purpose."""
    found = []
    for node, value in values.items():
        if foreign := [*value["busy"], *value["on_gpus"]]:
            fix = "ask for whole nodes (#SBATCH --exclusive); tell your site of what an earlier job left"
            text = "; ".join(foreign)
            found.append(_bad(node, "load", text, "no busy process but this job's", fix, state="warn"))
    return found


def neighbors(node: str, nodes: Sequence[str]) -> list[str]:
    """Those whose files a node looks for: the next few, so that many nodes do not read each other's all."""
    at = nodes.index(node)
    return [nodes[(at + 1 + step) % len(nodes)] for step in range(min(_NEIGHBORS, len(nodes) - 1))]


def folder(values: Values, wanted: Mapping[str, Sequence[str]]) -> list[NodeFinding]:
    """Nodes that see another run folder than most: of files sought there, or by others, most are missing.

    Args:
        values: whose files a node did not find.
        wanted: whose files it looked for.
    """
    shares = {}
    for node in values:
        readers = [other for other in values if node in wanted[other]]
        unseen = sum(node in values[other]["missing"] for other in readers)
        shares[node] = max(
            len(values[node]["missing"]) / max(1, len(wanted[node])), unseen / max(1, len(readers))
        )
    apart = [node for node, share in shares.items() if share > 0.5]
    if len(apart) == len(values):
        # Two nodes, say: the first is believed, as the job's script runs there.
        apart = apart[1:]
    text = "another folder than on other nodes: one does not see what the other wrote"
    fix = "have all nodes mount the file system of train.out, or choose another train.out"
    return [_bad(node, "run folder", text, "one folder for all nodes", fix) for node in apart]


def slow_ones(name: str, speeds: Mapping[str, float], unit: str, *, limits: Limits) -> list[NodeFinding]:
    """Nodes far below the median."""
    if len(speeds) < 2:
        return []
    middle = median(speeds.values())
    least = limits.slow * middle
    fix = "leave the node out: sbatch --exclude=NODE; look at its clock rates, memory and cables"
    return [
        _bad(node, name, f"{speed:.3g} {unit}", f"{least:.3g} {unit}, of a median of {middle:.3g}", fix)
        for node, speed in speeds.items()
        if speed < least
    ]


def scores(values: Values, limits: Limits) -> list[NodeFinding]:
    """Nodes, and GPUs of a node, that compute far more slowly than most."""
    found = []
    for name, unit in (("gflops", "GFLOP/s"), ("gib_s", "GiB/s")):
        speeds = {node: float(value[name]) for node, value in values.items()}
        found += slow_ones("score", speeds, f"{unit} on a core", limits=limits)
    needed, odd = odd_ones_out({node: value["cores"] for node, value in values.items()})
    fix = "ask for nodes of one kind (sbatch --constraint), or tell your site"
    found += [_bad(n, "score", f"{values[n]['cores']} cores", f"{needed}", fix, "warn") for n in odd]
    gpus = {node: min(value["tflops"]) for node, value in values.items() if value.get("tflops")}
    found += slow_ones("score", gpus, "TFLOP/s on its slowest GPU", limits=limits)
    fix = "leave the node out and tell your site: sbatch --exclude=NODE"
    return found + [
        _bad(node, "score", value["gpu_trouble"], "a product of matrices on each GPU", fix)
        for node, value in values.items()
        if value.get("gpu_trouble")
    ]


def score_text(values: Values) -> str:
    """From the slowest to the fastest."""
    texts = []
    for name, unit in (("gflops", "GFLOP/s"), ("gib_s", "GiB/s")):
        speeds = sorted(value[name] for value in values.values())
        texts.append(f"{speeds[0]:.3g} to {speeds[-1]:.3g} {unit}")
    return ", ".join(texts)


def failed_sums(trouble: str, blamed: Mapping[str, str]) -> list[NodeFinding]:
    """An all-reduce over all nodes that failed, and in which nodes' pairs it failed again."""
    fix = "leave the node out and tell your site: sbatch --exclude=NODE"
    found = [_bad(n, "all-reduce", text, "the right sums in time", fix) for n, text in blamed.items()]
    fix = "look at the launcher (--mpi) and the site's settings: python -m hvdlm.doctor on a node"
    text = f"{trouble}; no one node is to blame"
    return found or [_bad("", "all-reduce", text, "the right sums in time", fix)]


def sums(ranks: Values, limits: Limits) -> list[NodeFinding]:
    """All-reduces that were right: nodes that are slow with every partner, or how fast all are."""
    best = {node: max(said["pairs"].values()) for node, said in ranks.items() if said["pairs"]}
    found = slow_ones("all-reduce", best, "GiB/s with its best partner", limits=limits)
    speed = min(said["gib_s"] for said in ranks.values())
    pairs = f"pairs {min(best.values()):.3g} to {max(best.values()):.3g} GiB/s"
    text = f"right on {len(ranks)} nodes, {speed:.3g} GiB/s; {pairs}"
    return found or [NodeFinding("", Finding("all-reduce", "ok", text))]


def unanswered(name: str, answers: Mapping[str, Answer]) -> list[NodeFinding]:
    """Nodes that did not answer, or tripped over the question."""
    fix = "mend it, or leave the node out: sbatch --exclude=NODE"
    return [
        _bad(node, name, answer.trouble, "an answer", fix)
        for node, answer in answers.items()
        if answer.value is None
    ]


def _bad(node: str, name: str, found: str, needed: str, fix: str, state: State = "fail") -> NodeFinding:
    return NodeFinding(node, Finding(name, state, found, needed, fix.replace("NODE", node)))
