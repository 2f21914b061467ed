"""``python -m hvdlm.config --config FILE_OR_RECIPE``: check a configuration without torch.

``python -m hvdlm.config --docs`` prints docs/configuration.md.
"""

from __future__ import annotations

import sys

from hvdlm.config import run_command, total_steps
from hvdlm.config.parse import load_config
from hvdlm.config.reference import to_markdown


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["--docs"]:
        print(to_markdown(), end="")
        return 0
    config, recipe = load_config(arguments, prog="python -m hvdlm.config")
    steps = total_steps(config)
    tokens = steps * config.train.global_batch * config.data.seq_len
    print(f"{recipe}: good; {steps} steps of {config.train.global_batch} sequences, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("config", main))
