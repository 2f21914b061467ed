"""Errors that a user can put right, and the exit codes of every command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_REQUEUE = 75
EXIT_NO_PROGRESS = 93
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13


class UserError(Exception):
    """Something the user can put right: printed as one line, without a traceback.

    The message says where, what was found, what was needed, and what to do. `exit_code` is
    2 where retrying cannot help (usage, configuration, bad input) and 1 where it may
    (a full disk, a diverged run).
    """

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run a command's `main`: a `UserError` is one line on stderr, and so is Ctrl-C.

    Returns:
        The process exit code; 141 where the reader of stdout went away, which is no error (`| head`).
    """
    try:
        exit_code = main()
        sys.stdout.flush()
        return exit_code
    except UserError as error:
        print(f"hvdlm {name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"hvdlm {name}: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
