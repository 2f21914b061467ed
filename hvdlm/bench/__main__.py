"""``python -m hvdlm.bench NAME [--json]``: measure this machine."""

from __future__ import annotations

import argparse
import json
import sys

from hvdlm.bench import allreduce, loader, mask, preprocess, save, scaling, step
from hvdlm.config import EXIT_DONE, run_command

BENCHMARKS = {
    "allreduce": allreduce,
    "loader": loader,
    "mask": mask,
    "preprocess": preprocess,
    "save": save,
    "scaling": scaling,
    "step": step,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.bench",
        description="Measure this machine; every figure is a ratio of things that ran alternately.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        one = names.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print one JSON object")
        module.add_arguments(one)
    args = parser.parse_args(argv)
    result = BENCHMARKS[args.name].measure(args)
    # Under a launcher only rank 0 has one.
    if result:
        print(json.dumps(result) if args.json else BENCHMARKS[args.name].table(result), flush=True)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command("bench", main))
