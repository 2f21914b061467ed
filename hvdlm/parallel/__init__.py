"""One optimizer step over many processes: the family of strategies."""

from collections.abc import Callable

from torch import nn

from hvdlm.comm.world import World
from hvdlm.parallel.allreduce import AllReduce
from hvdlm.parallel.buckets import Buckets
from hvdlm.parallel.ddp import Ddp
from hvdlm.parallel.fixed import Fixed
from hvdlm.parallel.strategy import Piece, Read, StepPlan, StepStats, Strategy, Wish
from hvdlm.parallel.zero1 import Zero1

STRATEGIES: dict[str, Callable[[nn.Module, World, StepPlan], Strategy]] = {
    "allreduce": AllReduce,
    "buckets": Buckets,
    "zero1": Zero1,
    "ddp": Ddp,
    "fixed": Fixed,
}

__all__ = ["STRATEGIES", "Piece", "Read", "StepPlan", "StepStats", "Strategy", "Wish"]
