"""What one attempt of a run works with, agreed on by all ranks and built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlm.comm import device
from hvdlm.comm.world import World
from hvdlm.config import RunConfig, UserError, total_steps
from hvdlm.config.parse import keys, to_toml
from hvdlm.data.files import cure, write_atomic
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import Manifest, read_manifest, read_tokenizer
from hvdlm.data.order import share_of
from hvdlm.data.verify import BackgroundVerifier, verify_blocks
from hvdlm.models import MODELS, pad_vocab
from hvdlm.models.llama import load_hf_
from hvdlm.parallel import STRATEGIES, Strategy
from hvdlm.run import exit_record, restore, stop
from hvdlm.run.folder import Start, open_run
from hvdlm.run.ledger import Ledger
from hvdlm.run.metrics import Metrics
from hvdlm.train.headline import headline, sizes


@dataclass(frozen=True)
class Agreed:
    """What all ranks know before they build anything.

    `carried` are the small files that every checkpoint takes along, by name. `job_end_unix` is when
    the job ends, in seconds since 1970; 0 where it has no end.
    """

    start: Start
    manifest: Manifest
    carried: dict[str, bytes]
    job_end_unix: float


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

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the run consumes: a resume with other data or another tokenizer is refused."""
        return _fingerprints(self.agreed.manifest)

    def close(self) -> None:
        """End the threads and close the files."""
        self.loader.close()
        if self.verifier:
            self.verifier.close()
        if self.reports:
            self.reports.ledger.close()
            self.reports.metrics.close()
        self.watch.close()


def agree_on_start(config: RunConfig, run_folder: Path, ranks: World, *, job_end_unix: float = 0.0) -> Agreed:
    """Read the manifest and the run folder on rank 0, and tell all ranks what it knows.

    Raises:
        AgreedError: the data set is missing or damaged, or the run cannot go on so.

    Collective: yes.
    """
    data_folder = Path(config.data.path)

    def read() -> dict[str, Any]:
        manifest = read_manifest(data_folder)
        start = open_run(
            run_folder,
            resume=config.checkpoint.resume,
            config=keys(config),
            fingerprints=_fingerprints(manifest),
        )
        tokenizer = read_tokenizer(data_folder, manifest.tokenizer).decode()
        return {
            "manifest": manifest.to_json(),
            "start": start.to_json(),
            "tokenizer": tokenizer,
            "job_end_unix": job_end_unix,
        }

    agreed = ranks.on_root(read, name="start.agree")
    carried = {"config.toml": to_toml(config).encode(), "tokenizer.json": agreed["tokenizer"].encode()}
    return Agreed(
        Start.from_json(agreed["start"]),
        Manifest.from_json(agreed["manifest"]),
        carried,
        agreed["job_end_unix"],
    )


def open_session(config: RunConfig, run_folder: Path, ranks: World, agreed: Agreed) -> Session:
    """Build loader, model and strategy, and load the checkpoint where there is one.

    Raises:
        UserError: this rank's part of the data is damaged, or a checkpoint does not fit the model.

    Collective: yes.
    """
    start, manifest = agreed.start, agreed.manifest
    if ranks.is_root:
        _mark_running(run_folder, agreed)
    ranks.barrier(name="session.folder")
    watch = stop.StopWatch(
        run_folder,
        attempt=start.attempt,
        watch_file=ranks.is_root,
        deadline_unix=stop.deadline(agreed.job_end_unix, config.train.stop_margin_s),
    )
    loader = _open_loader(config, manifest, ranks)
    verifier = _verify(config, manifest, ranks)
    model = build_model(config, manifest, ranks, resumed=bool(start.checkpoint))
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
        for line in sizes(config, manifest, windows=loader.windows, ranks=ranks):
            reports.metrics.say(line)
    return Session(
        config, total_steps(config), run_folder, agreed, ranks, loader, strategy, watch, verifier, reports
    )


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    return {"data": manifest.fingerprint, "tokenizer": manifest.tokenizer.sha256}


def batch_plan(config: RunConfig) -> BatchPlan:
    """What a step consists of."""
    data, train = config.data, config.train
    return BatchPlan(
        data.seq_len, train.global_batch, train.micro_batch, train.seed, document_mask=data.document_mask
    )


def _mark_running(run_folder: Path, agreed: Agreed) -> None:
    for name, content in agreed.carried.items():
        write_atomic(run_folder / name, content)
    exit_record.write(run_folder, "running", attempt=agreed.start.attempt, step=agreed.start.step)


def _open_loader(config: RunConfig, manifest: Manifest, ranks: World) -> Loader:
    return Loader(
        Path(config.data.path),
        manifest,
        "train",
        plan=batch_plan(config),
        share=(ranks.rank, ranks.size),
        prefetch_steps=config.data.prefetch,
    )


def _verify(config: RunConfig, manifest: Manifest, ranks: World) -> BackgroundVerifier | None:
    """Check this rank's share of the shards' blocks: now, in a thread, or not."""
    data_folder, share = Path(config.data.path), (ranks.rank, ranks.size)
    if config.data.verify == "background":
        return BackgroundVerifier(data_folder, manifest, share=share)
    if config.data.verify == "before":
        for problem in verify_blocks(data_folder, manifest, share=share):
            raise UserError(f"{data_folder / problem.file}: {problem.detail}; {cure(data_folder)}")
    return None


def build_model(config: RunConfig, manifest: Manifest, ranks: World, *, resumed: bool) -> nn.Module:
    """The model on its device; its initial weights are those of rank 0.

    Args:
        config: of the run.
        manifest: of its data.
        ranks: of the run.
        resumed: a checkpoint's weights replace the initial ones, so `model.init` is not needed.

    Raises:
        AgreedError: `model.init` is no Llama model of this shape.
        UserError: there is no such device.

    Collective: yes.
    """
    torch.manual_seed(config.train.seed)
    model = MODELS[config.model.kind](config.model, pad_vocab(manifest.tokenizer.vocab_size))
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
