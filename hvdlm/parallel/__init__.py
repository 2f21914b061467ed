"""One optimizer step over many processes: the family of strategies."""

from collections.abc import Callable

from hvdlm.parallel.allreduce import AllReduce
from hvdlm.parallel.fixed import Fixed
from hvdlm.parallel.strategy import Piece, Read, StepStats, Strategy, Wish

STRATEGIES: dict[str, Callable[..., Strategy]] = {"allreduce": AllReduce, "fixed": Fixed}

__all__ = ["STRATEGIES", "Piece", "Read", "StepStats", "Strategy", "Wish"]
