"""The process on a node: reads questions, a line of JSON each, and answers each by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hvdlm.cluster.preflight import facts, folder, score
from hvdlm.config import UserError

Question = Callable[..., dict[str, Any]]


def questions() -> dict[str, Question]:
    """What a node can be asked, by name; the details of a question are the function's arguments."""
    return {
        "hello": facts.hello,
        "clock": facts.clock,
        "software": facts.software,
        "gpus": facts.gpus,
        "links": facts.links,
        "space": facts.space,
        "memlock": facts.memlock,
        "load": facts.load,
        "write": folder.write,
        "read": folder.read,
        "forget": folder.forget,
        "score": score.score,
    }


def answer_questions(more: Mapping[str, Question]) -> int:
    """Answers until stdin ends, as it does when whoever asks is gone.

    Args:
        more: questions beside those of this module.

    Returns:
        Exit status.
    """
    known = {**questions(), **more}
    for line in sys.stdin:
        details = json.loads(line)
        try:
            said = known[details.pop("question")](**details)
        except Exception as error:
            # Whatever a probe trips over is what is wrong with this node.
            said = {"trouble": _words(error)}
        print(json.dumps(said), flush=True)
    return 0


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
