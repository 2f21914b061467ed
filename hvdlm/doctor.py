"""Looks over this machine and installation: `python -m hvdlm.doctor [--json]`.

Each line says what was found, what is needed and how to fix it. Nothing is changed, and MPI
is only touched in child processes with a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from hvdlm.cluster.allreduce import rank_allreduce
from hvdlm.cluster.finding import Finding
from hvdlm.cluster.probes import findings
from hvdlm.config import run_command

_WIDTH = 22


def main(argv: list[str] | None = None) -> int:
    """Prints the report.

    Returns:
        0, or 1 where something fails; warnings alone are 0.
    """
    args = _parser().parse_args(argv)
    if args.allreduce:
        return rank_allreduce(args.allreduce)
    report = []
    for finding in findings():
        report.append(finding)
        if not args.json:
            print(line(finding), flush=True)
    failed = sum(finding.state == "fail" for finding in report)
    warned = sum(finding.state == "warn" for finding in report)
    if args.json:
        checks = [dataclasses.asdict(finding) for finding in report]
        print(json.dumps({"ok": not failed, "failed": failed, "warned": warned, "checks": checks}, indent=1))
    else:
        print(f"{len(report)} checks: {failed} failed, {warned} warnings")
    return 1 if failed else 0


def line(finding: Finding) -> str:
    """One finding for people; needed and fix only where they matter."""
    text = f"{finding.state:<5} {finding.name:<{_WIDTH}} {finding.found}"
    if finding.state in ("warn", "fail"):
        text += f"; needed: {finding.needed}; fix: {finding.fix}"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.doctor",
        description="Looks over this machine and installation; exit 0 if nothing fails, else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.add_argument(
        "--allreduce",
        type=int,
        metavar="RANKS",
        default=0,
        help="only sum over RANKS ranks, as one of them: mpirun -np 2 python -m hvdlm.doctor --allreduce 2",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command("doctor", main))
