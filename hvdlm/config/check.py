"""Combinations of knobs that cannot work, and what follows from those that can."""

from __future__ import annotations

import math

from hvdlm.config.errors import UserError
from hvdlm.config.knobs import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)


def check(config: RunConfig) -> RunConfig:
    """Refuse combinations that cannot work.

    Raises:
        UserError: naming the two keys, what was found and what was needed.
    """
    _check_ranges(config)
    _check_model(config.model)
    _check_train(config.train)
    _check_optim(config.optim)
    _check_schedule(config)
    _check_data(config.data)
    _check_fixed(config)
    _check_compression(config.parallel)
    _check_checkpoint(config)
    _require(
        min(config.eval.every, config.eval.batches, config.checkpoint.every) >= 0 and config.log.every >= 1,
        "eval.every, eval.batches and checkpoint.every must not be negative; log.every must be at least 1",
    )
    return config


BLOCK_SAMPLES = 4096
"""Samples within which the weights of a blend are kept: each source has one at least."""

_NOT_NEGATIVE = (
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.mtbf_h",
    "data.prefetch",
    "data.shuffle_mb",
    "log.profile",
    "model.mlp_width",
    "train.stop_margin_s",
    "train.spike_sigmas",
    "train.digest_every",
    "optim.weight_decay",
    "parallel.fusion_mb",
    "parallel.cycle_ms",
    "parallel.stall_timeout_s",
)
_AT_MOST = {
    "data.seq_len": 1 << 24,
    "data.shuffle_mb": 1 << 30,
    "train.steps": 1 << 40,
    "train.tokens": 1 << 60,
    "train.global_batch": 1 << 22,
}
"""So far the numbers of samples and bytes stay below 2^63."""
_ABOVE_ZERO = ("model.rope_theta", "model.norm_eps", "optim.eps", "parallel.bucket_mb")


def _check_ranges(config: RunConfig) -> None:
    for key in (*_NOT_NEGATIVE, *_ABOVE_ZERO):
        section, _, name = key.partition(".")
        value, above = getattr(getattr(config, section), name), key in _ABOVE_ZERO
        holds = 0 < value < math.inf if above else 0 <= value < math.inf
        _require(holds, f"{key} {value} must be {'above 0' if above else '0 or more'}")
    for key, most in _AT_MOST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        _require(value <= most, f"{key} {value} must be {most} at most")
    _require(bool(config.train.out), "train.out must name a folder, or be 'auto'")


def _check_model(model: ModelConfig) -> None:
    _require(
        model.layers >= 1 and model.width >= 1 and model.heads >= 1,
        "model: layers, width and heads must be at least 1",
    )
    _require(
        model.width % model.heads == 0,
        f"model.width {model.width} is not a multiple of model.heads {model.heads}",
    )
    _require(
        model.width // model.heads % 2 == 0,
        f"model.width / model.heads = {model.width // model.heads} is odd, rotary needs it even",
    )
    kv_heads = model.kv_heads or model.heads
    _require(
        kv_heads > 0 and model.heads % kv_heads == 0,
        f"model.heads {model.heads} is not a multiple of model.kv_heads {kv_heads}",
    )
    _require(0 <= model.dropout < 1, f"model.dropout {model.dropout} must lie in [0, 1)")


def _check_data(data: DataConfig) -> None:
    _require(data.seq_len >= 2, f"data.seq_len {data.seq_len} must be at least 2")
    _check_weights(data)
    limits = data.max_epochs if isinstance(data.max_epochs, dict) else {"": data.max_epochs}
    for folder, limit in limits.items():
        of = f" of {folder}" if folder else ""
        _require(limit >= 0, f"data.max_epochs {limit}{of} must be 0 (no limit) or more")
        _require(
            not folder or folder in data.weights,
            f"data.max_epochs names {folder}, which is not in data.path; it has {', '.join(data.weights)}",
        )


def _check_weights(data: DataConfig) -> None:
    _require(
        not (isinstance(data.path, str) and data.path.lstrip().startswith(("{", "["))),
        f"data.path {data.path} is no table of folders with whole weights; write "
        """'{"data/code": 3, "data/prose": 1}'""",
    )
    _require(bool(data.weights), "data.path is an empty table; name at least one folder")
    _require(all(data.weights), "data.path must name a folder")
    total = sum(data.weights.values())
    for folder, weight in data.weights.items():
        _require(weight >= 1, f"data.path: weight {weight} of {folder} must be at least 1; or leave it out")
        _require(
            weight * BLOCK_SAMPLES >= total and total < 2**31,
            f"data.path: weight {weight} of {folder} in a total of {total}: it must be at least one in "
            f"{BLOCK_SAMPLES}, and the total below 2^31; use smaller numbers, or leave it out",
        )


def _check_checkpoint(config: RunConfig) -> None:
    keep, validation = config.checkpoint, config.eval
    _require(keep.keep_last >= 2, f"checkpoint.keep_last {keep.keep_last} must be at least 2")
    _require(
        not keep.keep_every or (keep.every > 0 and keep.keep_every % keep.every == 0),
        f"checkpoint.keep_every {keep.keep_every} is not a multiple of checkpoint.every {keep.every}, so few "
        "steps or none would be kept; change one of them",
    )
    validated = validation.batches > 0 and validation.every > 0 and keep.every % validation.every == 0
    _require(
        not keep.keep_best or validated,
        f"checkpoint.keep_best {keep.keep_best} needs each checkpoint validated: eval.batches above 0, "
        f"and checkpoint.every {keep.every} a multiple of eval.every {validation.every}",
    )


def _check_train(train: TrainConfig) -> None:
    _require(train.micro_batch >= 1, f"train.micro_batch {train.micro_batch} must be at least 1")
    _require(
        train.global_batch >= 1 and train.global_batch % train.micro_batch == 0,
        f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}",
    )
    _require(train.steps >= 1, f"train.steps {train.steps} must be at least 1")
    _require(train.tokens >= 0, f"train.tokens {train.tokens} must be 0 (use train.steps) or more")
    _require(train.max_skipped >= 1, f"train.max_skipped {train.max_skipped} must be at least 1")
    _require(0 <= train.seed < 2**63, f"train.seed {train.seed} must lie in [0, 2^63)")


def _check_fixed(config: RunConfig) -> None:
    """What would round in an order of its own."""
    if config.parallel.strategy != "fixed":
        return
    for key, found, needed in (
        ("parallel.compression", config.parallel.compression, "none"),
        ("train.precision", config.train.precision, "fp32"),
        ("model.compile", config.model.compile, False),
    ):
        _require(
            found == needed,
            f"{key} is {found}, parallel.strategy fixed needs {needed}; change it, or use "
            "parallel.strategy allreduce",
        )


def _check_compression(parallel: ParallelConfig) -> None:
    _require(
        parallel.compression != "bf16" or parallel.strategy in ("buckets", "zero1"),
        f"parallel.compression is bf16, parallel.strategy {parallel.strategy}: needed buckets or zero1, as "
        "no other reduces bf16; change one of them, or use parallel.compression fp16",
    )


def _check_optim(optim: OptimConfig) -> None:
    _require(optim.lr > 0, f"optim.lr {optim.lr} must be above 0")
    _require(
        0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr {optim.min_lr} must lie in [0, optim.lr {optim.lr}]; change both together",
    )
    _require(all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas} must lie in [0, 1)")
    # torch's SGD keeps no buffer for 0, and the state of a run must be there to be saved.
    _require(0 < optim.momentum < 1, f"optim.momentum {optim.momentum} must lie in (0, 1)")
    _require(
        optim.clip >= 0 and optim.warmup_steps >= 0, "optim.clip and optim.warmup_steps must not be negative"
    )


def _check_schedule(config: RunConfig) -> None:
    optim, validation = config.optim, config.eval
    _require(
        0 <= optim.decay_fraction <= 1, f"optim.decay_fraction {optim.decay_fraction} must lie in [0, 1]"
    )
    for key, value in (("factor", optim.plateau_factor), ("threshold", optim.plateau_threshold)):
        _require(0 < value < 1, f"optim.plateau_{key} {value} must lie between 0 and 1")
    _require(
        optim.plateau_patience >= 1, f"optim.plateau_patience {optim.plateau_patience} must be at least 1"
    )
    if optim.schedule == "plateau":
        _require(
            validation.every > 0 and validation.batches > 0,
            f"optim.schedule plateau goes by the validation loss, but eval.every is {validation.every} and "
            f"eval.batches {validation.batches}; make both above 0, or choose another schedule",
        )
        _require(
            optim.min_lr > 0,
            "optim.schedule plateau ends at optim.min_lr, which is 0 and never reached; raise it",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def total_steps(config: RunConfig) -> int:
    """Optimizer steps in all: `train.steps`, or as many as `train.tokens` needs, rounded up."""
    if not config.train.tokens:
        return config.train.steps
    return -(-config.train.tokens // (config.train.global_batch * config.data.seq_len))
