"""``python -m hvdlm.elastic``: train on hosts that come and go; what it does not know goes to train.

python -m hvdlm.elastic --config mine.toml     # on this machine, or on all nodes of this Slurm job
python -m hvdlm.elastic --join RUN             # from another job or machine: takes part in that run
"""

from __future__ import annotations

import argparse
import sys

from hvdlm.config import UserError, run_command
from hvdlm.elastic.drive import drive
from hvdlm.elastic.join import join

_MOST_SLOTS = 64


def main(argv: list[str] | None = None) -> int:
    args, train_args = _parser().parse_known_args(argv)
    if args.slots < 0 or args.slots > _MOST_SLOTS:
        raise UserError(f"--slots {args.slots}: needed 1 to {_MOST_SLOTS} workers a host, or 0 for automatic")
    if not args.join:
        return drive(args, train_args)
    if train_args:
        raise UserError(
            f"--join takes no arguments of train, found {' '.join(train_args)}; the driver has them"
        )
    return join(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.elastic",
        description="Train on hosts that come and go: one that is lost or leaves costs a step at most. "
        "In a Slurm job all its nodes take part, else this machine; others join by --join RUN. "
        "All other arguments are those of python -m hvdlm.train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=0,
        metavar="N",
        help="workers a host (0: tasks a node in a job, else GPUs)",
    )
    parser.add_argument(
        "--min-workers", type=int, default=1, metavar="N", help="wait while there are fewer (default 1)"
    )
    parser.add_argument("--join", default="", metavar="RUN", help="take part in the run of this folder")
    parser.add_argument(
        "--host", default="", metavar="NAME", help="with --join: how this host is called (default: its name)"
    )
    parser.add_argument(
        "--wait-s",
        type=float,
        default=600.0,
        metavar="S",
        help="with --join: wait so long for a driver that is not there (default 600)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command("elastic", main))
