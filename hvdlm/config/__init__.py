"""The configuration of a run: its knobs, their defaults, their checks and their files.

Reading files and arguments (`hvdlm.config.parse`) is apart, so that a worker process that
needs only a section does not import the parser.
"""

from hvdlm.config.check import check, total_steps
from hvdlm.config.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NO_PROGRESS,
    EXIT_REQUEUE,
    EXIT_USAGE,
    UserError,
    run_command,
)
from hvdlm.config.knobs import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "EXIT_CRASH",
    "EXIT_DONE",
    "EXIT_INTERRUPTED",
    "EXIT_NO_PROGRESS",
    "EXIT_REQUEUE",
    "EXIT_USAGE",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "UserError",
    "check",
    "run_command",
    "total_steps",
]
