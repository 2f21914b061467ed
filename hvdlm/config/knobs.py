"""Every knob of a training run, its default and its one-line meaning.

The sections are frozen dataclasses. Only commands see `RunConfig`; everything below them
takes a section or plain values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    kind: Literal["transformer"] = "transformer"
    """Architecture: a key of hvdlm.models.MODELS."""
    layers: int = 12
    """Number of blocks."""
    width: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads; must divide width into an even head size."""
    kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 = heads."""
    mlp_width: int = 0
    """Inner width of the MLP; 0 = 8/3 of width, rounded up to a multiple of 64."""
    tie_embeddings: bool = True
    """Use one matrix for the input embedding and the output projection."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Epsilon inside RMSNorm."""
    dropout: float = 0.0
    """Dropout probability on residual branches, seeded per (seed, step, slot)."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass, which computes the rest again: less memory."""
    compile: bool = False
    """Compile the blocks with torch.compile for training: a minute at the start, for faster steps."""
    init: str = "random"
    """'random', or a folder with a Hugging Face Llama model to continue from."""


@dataclass(frozen=True)
class DataConfig:
    path: str | dict[str, int] = "data/demo"
    """Folder of HDF5 shards written by hvdlm.preprocess, or a blend: a table of folders with weights."""
    seq_len: int = 1024
    """Tokens a sample (T); a window of T+1 tokens is read."""
    max_epochs: int | dict[str, int] = 0
    """Refuse a run that would read a source more often: for all, or a table of folders; 0 = no limit."""
    new_stage: bool = False
    """Let a run go on with another blend: from its checkpoint on, each source where it was left."""
    shuffle_mb: int = 0
    """MiB of tokens within which samples are shuffled, for slow random reads; 0 = over the whole split."""
    prefetch: int = 4
    """Steps read ahead by the loader's threads; 0 = no threads, a step is read when it is due."""
    verify: Literal["background", "before", "off"] = "background"
    """When each rank checks its share of the shards' block digests; staged shards are always checked."""
    stage: str = ""
    """Folder on each node's own disk, such as $TMPDIR, to copy the shards to that it needs; '' = none."""
    document_mask: bool = False
    """Confine attention to the token's own document, whose positions begin at 0."""

    @property
    def weights(self) -> dict[str, int]:
        """The weight of each source by its folder; one folder is a blend of one source."""
        return {self.path: 1} if isinstance(self.path, str) else self.path

    def epoch_limit(self, folder: str) -> int:
        """How often a source may be read; 0 = no limit."""
        return self.max_epochs if isinstance(self.max_epochs, int) else self.max_epochs.get(folder, 0)


@dataclass(frozen=True)
class TrainConfig:
    out: str = "auto"
    """Run folder; 'auto' = data/runs/RECIPE."""
    steps: int = 10000
    """Optimizer steps in all."""
    tokens: int = 0
    """Tokens in all, instead of steps; 0 = use steps."""
    global_batch: int = 256
    """Sequences an optimizer step, over all ranks; never depends on the number of ranks."""
    micro_batch: int = 8
    """Sequences a forward pass; global_batch must be a multiple of it."""
    seed: int = 0
    """Seed of the initial weights, the order of samples and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute precision; bf16 and fp16 are autocast over fp32 master weights, fp16 with a scaled loss."""
    stop_margin_s: int = 120
    """Seconds before the Slurm job's end at which a run saves and stops by itself."""
    max_skipped: int = 10
    """So many steps in a row that update nothing (not finite, or a loss spike) end the run."""
    spike_sigmas: float = 6.0
    """A loss so many standard deviations above the mean of the last 128 updates nothing; 0 = no limit."""
    digest_every: int = 1000
    """Steps between comparisons of the ranks' parameters, besides each checkpoint; 0 = none at all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; 'auto' takes the GPU of this local rank where there is one."""


@dataclass(frozen=True)
class OptimConfig:
    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    """torch's optimizer; of adam and sgd the weight decay is an L2 penalty."""
    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Learning rate at the end of the schedule, and its floor after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.1
    """Weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to lr."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "plateau", "constant"] = "cosine"
    """Learning rate after the warm-up; 'plateau' goes by the validation loss, and may end the run early."""
    decay_fraction: float = 0.2
    """Part of the steps, at their end, in which 'wsd' decays to min_lr."""
    plateau_factor: float = 0.5
    """What 'plateau' multiplies the learning rate by."""
    plateau_patience: int = 5
    """Validations without improvement until 'plateau' cuts the rate; at min_lr, until the run ends."""
    plateau_threshold: float = 0.001
    """Smallest relative fall of the validation loss that 'plateau' takes for an improvement."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["auto", "allreduce", "buckets", "zero1", "ddp", "fixed"] = "allreduce"
    """How one optimizer step is done: see docs/parallelism.md; 'auto' = the fastest by `hvdlm.bench step`."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Precision of gradients on the wire; with zero1 and bf16 also that of the parameters sent back."""
    bucket_mb: float = 25.0
    """Gradients sent together by buckets, zero1 and ddp, in MiB."""
    fusion_mb: int = 64
    """Horovod's tensor-fusion buffer in MiB, and the gradients that allreduce fuses."""
    cycle_ms: float = 0.0
    """Horovod's cycle time in ms; 0 = 1 with a GPU, 2 on a CPU, 100 for one process alone."""
    stall_timeout_s: int = 600
    """A collective that some rank does not join for so long ends the job; 0 = never."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 500
    """Steps between validations, besides step 0 and the last; 0 = only those two."""
    batches: int = 16
    """Global batches of a fixed permutation of the validation split; 0 = no validation."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints, besides the last; 0 = only the last, and those of mtbf_h."""
    mtbf_h: float = 0.0
    """Hours between failures, for checkpoints by the clock, as often as loses least; 0 = none of these."""
    asynchronous: bool = True
    """Write checkpoints in a thread while training goes on, from a copy in CPU memory."""
    keep_last: int = 2
    """Checkpoints kept; at least 2, because the newest may be found damaged."""
    keep_every: int = 0
    """Checkpoints of multiples of so many steps are never deleted; 0 = none."""
    keep_best: int = 0
    """So many checkpoints with the smallest validation loss are not deleted; 0 = none."""
    resume: str = "auto"
    """'auto' = the run's newest valid checkpoint; 'never' = refuse a used folder; or a PATH to begin at."""


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    """Steps between log lines."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard (needs hvdlm[tensorboard])."""
    profile: int = 0
    """Profile so many steps, from the third after the start, into RUN/profile (Chrome, Perfetto); 0 = off."""
    timeline: bool = False
    """Write Horovod's timeline to RUN/timeline-ATTEMPT.json (Chrome, Perfetto)."""


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
