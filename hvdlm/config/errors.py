"""Errors that a user can put right, and the exit codes of every command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

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
    (a full disk, a diverged run). What it quotes may hold line breaks: they are escaped.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
        self.exit_code = exit_code


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run a command's `main`: a `UserError` is one line on stderr, and so is Ctrl-C.

    Returns:
        The process exit code; 141 where the reader of stdout went away, which is no error (`| head`).
    """
    _ready_streams()
    try:
        return _flushed(main())
    except UserError as error:
        print(f"hvdlm {name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"hvdlm {name}: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return EXIT_BROKEN_PIPE


def _ready_streams() -> None:
    """Streams that are there, and escape what their encoding cannot show."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Closed by the caller; the next file opened would get its number.
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open as long as the process)
    if getattr(sys.stdout, "errors", "") == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _flushed(exit_code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up_stdout()
        raise UserError(f"standard output: cannot be written: {error.strerror}", EXIT_CRASH) from error
    return exit_code


def _give_up_stdout() -> None:
    # Python flushes stdout once more at exit, which would print a traceback.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
