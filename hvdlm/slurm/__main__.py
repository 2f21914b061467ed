"""``python -m hvdlm.slurm NAME``: a run as jobs of a Slurm cluster."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from hvdlm.config import run_command
from hvdlm.slurm import conclude, gate, preflight, rehearse, status, stop, submit, tail

SUBCOMMANDS: dict[str, ModuleType] = {
    "submit": submit,
    "status": status,
    "tail": tail,
    "stop": stop,
    "gate": gate,
    "conclude": conclude,
    "preflight": preflight,
    "rehearse": rehearse,
}
"""Each has a docstring, `add_arguments(parser)` and `run(args) -> exit code`."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.slurm",
        description="Submit a run to a Slurm cluster, look after it, and stop it.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in SUBCOMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(names.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["submit"]:
        words = ["submit", *submit.separate(words[1:])]
    args = parser.parse_args(words)
    code: int = SUBCOMMANDS[args.name].run(args)
    return code


if __name__ == "__main__":
    sys.exit(run_command("slurm", main))
