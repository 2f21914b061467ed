"""What one attempt of a run works with, agreed on by all ranks and built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlm.comm import device
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import RunConfig, UserError, total_steps
from hvdlm.config.parse import keys, to_toml
from hvdlm.data.files import cure, write_atomic
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import Manifest, TokenizerInfo, read_tokenizer
from hvdlm.data.order import share_of
from hvdlm.data.sources import Source, read_sources, window_counts
from hvdlm.data.verify import BackgroundVerifier, verify_blocks
from hvdlm.models import MODELS, pad_vocab
from hvdlm.models.llama import load_hf_
from hvdlm.parallel import STRATEGIES, Strategy
from hvdlm.run import exit_record, restore, stop
from hvdlm.run.folder import Start, discard_empty, make_folder, open_run
from hvdlm.run.lease import Lease
from hvdlm.run.ledger import Ledger
from hvdlm.run.metrics import Metrics
from hvdlm.run.stages import StageSource, check_epochs
from hvdlm.train.headline import headline, sizes


@dataclass(frozen=True)
class Agreed:
    """What all ranks know before they build anything.

    `carried` are the small files that every checkpoint takes along, by name. `job_end_unix` is when
    the job ends, in seconds since 1970; 0 where it has no end. Only rank 0 has the `lease`.
    """

    start: Start
    sources: list[Source]
    carried: dict[str, bytes]
    job_end_unix: float
    lease: Lease | None

    def close(self) -> None:
        """Give the run folder free."""
        if self.lease:
            self.lease.release()

    @property
    def tokenizer(self) -> TokenizerInfo:
        """That of every source."""
        return self.sources[0].manifest.tokenizer


@dataclass(frozen=True)
class Reports:
    """What rank 0 writes while a run goes on."""

    ledger: Ledger
    metrics: Metrics


@dataclass(frozen=True)
class Session:
    """One attempt of a run; only rank 0 has `reports`."""

    config: RunConfig
    steps: int
    run_folder: Path
    agreed: Agreed
    ranks: World
    loader: Loader
    strategy: Strategy
    watch: stop.StopWatch
    verifier: BackgroundVerifier | None
    reports: Reports | None

    def check_lease(self) -> None:
        """On rank 0: is the run still this start's?

        Raises:
            UserError: another start took over.
        """
        if self.agreed.lease:
            self.agreed.lease.check()

    def close(self) -> None:
        """End the threads and close the files."""
        self.loader.close()
        if self.verifier:
            self.verifier.close()
        if self.reports:
            self.reports.ledger.close()
            self.reports.metrics.close()
        self.agreed.close()
        self.watch.close()


def agree_on_start(config: RunConfig, run_folder: Path, ranks: World, *, job_end_unix: float = 0.0) -> Agreed:
    """Read the manifests and the run folder on rank 0, and tell all ranks what it knows.

    Raises:
        AgreedError: a data set is missing or damaged, or would be read too often, or the run cannot
            go on so.

    Collective: yes.
    """
    leases: list[Lease] = []

    def read() -> dict[str, Any]:
        sources = read_sources(config.data.weights)
        first = sources[0]
        make_folder(run_folder)
        leases.append(Lease(run_folder))
        start = _open_run(config, run_folder, sources)
        return {
            "sources": [(str(source.folder), source.manifest.to_json()) for source in sources],
            "start": start.to_json(),
            "tokenizer": read_tokenizer(first.folder, first.manifest.tokenizer).decode(),
            "job_end_unix": job_end_unix,
        }

    try:
        agreed = ranks.on_root(read, name="start.agree")
    except AgreedError:
        for lease in leases:
            lease.release()
            discard_empty(run_folder)
        raise
    carried = {"config.toml": to_toml(config).encode(), "tokenizer.json": agreed["tokenizer"].encode()}
    sources = [Source(Path(folder), Manifest.from_json(text)) for folder, text in agreed["sources"]]
    return Agreed(
        Start.from_json(agreed["start"]),
        sources,
        carried,
        agreed["job_end_unix"],
        leases[0] if leases else None,
    )


def open_session(config: RunConfig, run_folder: Path, ranks: World, agreed: Agreed) -> Session:
    """Build loader, model and strategy, and load the checkpoint where there is one.

    Raises:
        UserError: this rank's part of the data is damaged, or a checkpoint does not fit the model.

    Collective: yes.
    """
    start = agreed.start
    if ranks.is_root:
        _mark_running(run_folder, agreed)
    ranks.barrier(name="session.folder")
    watch = stop.StopWatch(
        run_folder,
        attempt=start.attempt,
        watch_file=ranks.is_root,
        deadline_unix=stop.deadline(agreed.job_end_unix, config.train.stop_margin_s),
    )
    loader = _open_loader(config, agreed, ranks)
    verifier = _verify(config, agreed.sources, ranks)
    model = build_model(config, agreed.tokenizer, ranks, resumed=bool(start.checkpoint))
    strategy = _build_strategy(config, model, ranks)
    if start.checkpoint:
        strategy.load(restore.reopen(Path(start.checkpoint)).read)
    if not ranks.same(strategy.digest(), name="session.digest"):
        raise RuntimeError("the ranks hold different parameters after loading")
    reports = None
    if ranks.is_root:
        reports = _open_reports(config, run_folder, start, ranks=ranks, model=model)
        for line in headline(config, run_folder, start, ranks=ranks, model=model):
            reports.metrics.say(line)
        for line in sizes(config, agreed.sources, start, windows=loader.windows, ranks=ranks):
            reports.metrics.say(line)
    return Session(
        config, total_steps(config), run_folder, agreed, ranks, loader, strategy, watch, verifier, reports
    )


def _open_run(config: RunConfig, run_folder: Path, sources: list[Source]) -> Start:
    """How the run starts, once it is known that no source will be read too often."""
    start = open_run(
        run_folder,
        resume=config.checkpoint.resume,
        config=keys(config),
        tokenizer=sources[0].manifest.tokenizer.sha256,
        sources=tuple(
            StageSource(folder, source.manifest.fingerprint, weight)
            for (folder, weight), source in zip(config.data.weights.items(), sources, strict=True)
        ),
    )
    limits = [config.data.epoch_limit(folder) for folder in config.data.weights]
    check_epochs(
        start.stages,
        list(zip(window_counts(sources, "train", config.data.seq_len), limits, strict=True)),
        steps=total_steps(config),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
    )
    return start


def batch_plan(config: RunConfig) -> BatchPlan:
    """What a step consists of."""
    train = config.train
    return BatchPlan(
        config.data.seq_len, train.global_batch, train.micro_batch, train.seed, config.data.shuffle_mb
    )


def _mark_running(run_folder: Path, agreed: Agreed) -> None:
    for name, content in agreed.carried.items():
        write_atomic(run_folder / name, content)
    exit_record.write(run_folder, "running", attempt=agreed.start.attempt, step=agreed.start.step)


def _open_loader(config: RunConfig, agreed: Agreed, ranks: World) -> Loader:
    return Loader(
        agreed.sources,
        "train",
        blend=agreed.start.stages[-1].blend,
        plan=batch_plan(config),
        share=(ranks.rank, ranks.size),
        prefetch_steps=config.data.prefetch,
    )


def _verify(config: RunConfig, sources: list[Source], ranks: World) -> BackgroundVerifier | None:
    """Check this rank's share of the shards' blocks: now, in a thread, or not."""
    share = (ranks.rank, ranks.size)
    if config.data.verify == "background":
        return BackgroundVerifier(sources, share=share)
    if config.data.verify == "before":
        for source in sources:
            for problem in verify_blocks(source.folder, source.manifest, share=share):
                raise UserError(f"{source.folder / problem.file}: {problem.detail}; {cure(source.folder)}")
    return None


def build_model(config: RunConfig, tokenizer: TokenizerInfo, ranks: World, *, resumed: bool) -> nn.Module:
    """The model on its device; its initial weights are those of rank 0.

    Args:
        config: of the run.
        tokenizer: of its data.
        ranks: of the run.
        resumed: a checkpoint's weights replace the initial ones, so `model.init` is not needed.

    Raises:
        AgreedError: `model.init` is no Llama model of this shape.
        UserError: there is no such device.

    Collective: yes.
    """
    torch.manual_seed(config.train.seed)
    model = MODELS[config.model.kind](config.model, pad_vocab(tokenizer.vocab_size))
    if config.model.init != "random" and not resumed:
        # On rank 0 alone: the strategy broadcasts its weights.
        ranks.on_root(lambda: load_hf_(model, Path(config.model.init)), name="session.init")
    return model.to(device.pick(config.train.device, ranks.local_rank))


def _build_strategy(config: RunConfig, model: nn.Module, ranks: World) -> Strategy:
    slots = share_of(config.train.global_batch // config.train.micro_batch, (ranks.rank, ranks.size))
    return STRATEGIES[config.parallel.strategy](
        model,
        ranks,
        optim=config.optim,
        parallel=config.parallel,
        precision=config.train.precision,
        slots=len(slots),
    )


def _open_reports(
    config: RunConfig, run_folder: Path, start: Start, *, ranks: World, model: nn.Module
) -> Reports:
    metrics = Metrics(
        run_folder,
        attempt=start.attempt,
        steps=total_steps(config),
        tokens_per_step=config.train.global_batch * config.data.seq_len,
        flops_per_token=_flops_per_token(model, config.data.seq_len),
        world_size=ranks.size,
    )
    if config.log.tensorboard:
        metrics.open_board(run_folder / "tensorboard")
    metrics.open_bar(start.step)
    return Reports(Ledger(run_folder, attempt=start.attempt, resumed_at=start.step + 1), metrics)


def _flops_per_token(model: nn.Module, seq_len: int) -> int:
    """What the model says of itself; 0 where it does not say, and then no MFU is shown."""
    count = getattr(model, "flops_per_token", None)
    return int(count(seq_len)) if callable(count) else 0
