"""Look over the nodes of this job before a run starts on them, and name the bad ones.

One process on the job's first node starts a step on each node, asks it questions, and compares the answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from hvdlm.cluster.exclude import exclude, nodes_of_job
from hvdlm.cluster.preflight import fabric
from hvdlm.cluster.preflight.check import FOLDER, Plan, Preflight
from hvdlm.cluster.preflight.compare import Limits, NodeFinding
from hvdlm.cluster.preflight.groups import Launcher
from hvdlm.cluster.preflight.node import answer_questions
from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_REQUEUE, UserError
from hvdlm.config.parse import folder_of, load_config, to_toml

_NUMBERS = (
    ("--limit-s", 120.0, "seconds for everything"),
    ("--first-s", 40.0, "seconds of them for a node's first answer"),
    ("--skew-s", 2.0, "seconds that a clock may differ from the first node's"),
    ("--free-gib", 5.0, "space that run folder and TMPDIR need"),
    ("--slow", 0.5, "a node below this share of the median is slow; 0: none is"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: those of train")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--on-bad",
        choices=("stop", "exclude", "warn"),
        default="stop",
        help="stop: exit 1; exclude: the queued jobs of this name leave bad nodes out, exit 75; warn: exit 0",
    )
    parser.add_argument(
        "--mpi",
        metavar="TYPE",
        default=os.environ.get("HVDLM_MPI", "pmix"),
        help="how to start the all-reduce: a type of srun --mpi (none: Gloo), mpirun, off (HVDLM_MPI, pmix)",
    )
    for name, default, meaning in _NUMBERS:
        parser.add_argument(name, type=float, metavar="N", default=default, help=f"{meaning} (%(default)g)")
    parser.add_argument(
        "--most", type=int, default=4, metavar="N", help="nodes that a run may leave out in all (%(default)d)"
    )
    # What the process on the first node starts on others.
    parser.add_argument("--part", choices=("node", "rank"), help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Returns: 0 where all is well or --on-bad is warn, 1 with bad nodes, 75 where those were excluded."""
    if args.part == "node":
        return answer_questions({"config": _config})
    if args.part == "rank":
        return fabric.rank(args.meeting, limit_s=args.limit_s)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("preflight: found several tasks, needed one process; start it without srun")
    nodes = nodes_of_job(os.environ)
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder = folder_of(config, recipe).absolute()
    begun = time.monotonic()
    check = Preflight(_plan(args, nodes, folder), limit_s=args.limit_s, first_s=args.first_s)
    for found in check.run():
        if not args.json:
            print(line(found), flush=True)
    report = _report(check, nodes, seconds=time.monotonic() - begun)
    _write(folder / FOLDER / f"{os.environ.get('SLURM_JOB_ID', '0')}.json", report)
    if args.json:
        print(json.dumps(report), flush=True)
    return _conclude(args, check, folder)


def line(one: NodeFinding) -> str:
    """One finding for people."""
    finding = one.finding
    text = f"{finding.state:<5} {one.node or 'all':<12} {finding.name:<12} {finding.found}"
    if finding.state in ("warn", "fail"):
        text += f"; needed: {finding.needed}; do: {finding.fix}"
    return text


def _plan(args: argparse.Namespace, nodes: tuple[str, ...], folder: Path) -> Plan:
    # What the site's file puts before python; in it this interpreter has the same path.
    container = shlex.split(os.environ.get("HVDLM_CONTAINER", ""))
    own = (*container, sys.executable, "-m", "hvdlm.slurm", "preflight", "--part")
    launcher = Launcher(args.mpi, (*own, "rank"), folder / FOLDER)
    return Plan(
        nodes=nodes,
        run_folder=folder,
        on_node=(*own, "node"),
        launcher=None if args.mpi == "off" else launcher,
        arguments=tuple(args.arguments),
        limits=Limits(args.skew_s, args.free_gib, args.slow),
    )


def _config(arguments: list[str]) -> dict[str, Any]:
    """A node's digest of the resolved configuration."""
    config, _ = load_config(arguments, prog="python -m hvdlm.train")
    return {"config": hashlib.sha256(to_toml(config).encode()).hexdigest()[:16]}


def _report(check: Preflight, nodes: tuple[str, ...], *, seconds: float) -> dict[str, Any]:
    return {
        "ok": check.ok,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "nodes": list(nodes),
        "bad": check.bad,
        "seconds": round(seconds, 1),
        "findings": [{"node": one.node, **dataclasses.asdict(one.finding)} for one in check.findings],
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    """The report; where the folder cannot be written that is among the findings."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        print(f"hvdlm slurm: warning: {path}: cannot be written: {error.strerror}", file=sys.stderr)


def _conclude(args: argparse.Namespace, check: Preflight, folder: Path) -> int:
    if check.ok:
        return EXIT_DONE
    bad = ",".join(check.bad)
    print(f"preflight: bad nodes: {bad or 'none in particular'}", file=sys.stderr, flush=True)
    if args.on_bad == "warn":
        return EXIT_DONE
    if args.on_bad == "exclude" and bad:
        jobs = exclude(check.bad, folder / FOLDER, os.environ, most=args.most)
        print(f"preflight: left out of job {', '.join(jobs)}: {bad}", file=sys.stderr, flush=True)
        return EXIT_REQUEUE
    return EXIT_CRASH
