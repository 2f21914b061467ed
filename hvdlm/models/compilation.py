"""What is given to torch.compile, and how."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvdlm.config import UserError

_IN_THIS_THREAD: dict[str, Any] = {"compile_threads": 1}
"""Else the compiler's pool would be a process for each core beside every rank."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, once a process: uncompiled, flex attention fills in the whole matrix of scores."""
    return torch.compile(function, options=_IN_THIS_THREAD)


def compile_blocks_(model: nn.Module) -> None:
    """Have a model's `blocks` compiled when they are first called; the names of its parameters stay.

    The blocks run the same code, so one compilation does for all. Dropout draws as it would without.

    Args:
        model: on its device.

    Raises:
        UserError: there is no C++ compiler for a model on a CPU, or none of C for one on a GPU.
    """
    kind = next(model.parameters()).device.type
    _require_compiler(*(("C++", "CXX", ("g++",)) if kind == "cpu" else ("C", "CC", ("gcc", "clang"))))
    for block in model.get_submodule("blocks").children():
        block.compile(options=_IN_THIS_THREAD | {"fallback_random": True})


def _require_compiler(language: str, variable: str, programs: tuple[str, ...]) -> None:
    """Torch would say so too, in a traceback of every rank and after the first batch."""
    chosen = os.environ.get(variable)
    wanted = (chosen,) if chosen else programs
    if not any(shutil.which(program) for program in wanted):
        raise UserError(
            f"model.compile true: torch.compile needs a {language} compiler, and there is no "
            f"{' or '.join(wanted)} in PATH; load one (module load gcc), name it in {variable}, or leave "
            "model.compile false"
        )
