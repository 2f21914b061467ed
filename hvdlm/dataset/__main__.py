"""``python -m hvdlm.dataset ACTION``: check, repair, show, import and export folders of HDF5 shards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hvdlm.comm import launch
from hvdlm.config import EXIT_USAGE, UserError, run_command
from hvdlm.dataset import export, import_, inspect, repair, verify

_ACTIONS = {"verify": verify, "repair": repair, "inspect": inspect, "import": import_, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None = the command line's.

    Returns:
        0; or 1 if `verify` found anything wrong.

    Raises:
        UserError: There is no usable data set or input.

    Collective: `verify`; the others refuse to run on several ranks.
    """
    args = _parser().parse_args(argv)
    return _run(args, launch.classify(os.environ))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.dataset",
        description="Check, repair, show, import or export a folder of HDF5 shards.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in _ACTIONS.items():
        described = actions.add_parser(
            name, help=action.HELP, description=action.DESCRIPTION, allow_abbrev=False
        )
        action.add_arguments(described)
    return parser


def _run(args: argparse.Namespace, here: launch.Launch) -> int:
    if args.action == "verify":
        return verify.run(args, here)
    if here.size == 1:
        return int(_ACTIONS[args.action].run(args))
    if here.rank == 0:
        raise UserError(f"{args.action} runs in one process, found {here.size}; start it without a launcher")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(run_command("dataset", main))
