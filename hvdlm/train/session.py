"""What one attempt of a run works with, built from what the ranks have agreed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hvdlm.comm import device
from hvdlm.comm.world import World
from hvdlm.config import RunConfig, total_steps
from hvdlm.data.files import unwritable, write_atomic
from hvdlm.data.loader import BatchPlan, Loader
from hvdlm.data.manifest import TokenizerInfo
from hvdlm.data.order import share_of
from hvdlm.data.sources import Source
from hvdlm.models import MODELS, pad_vocab
from hvdlm.models.compilation import compile_blocks_
from hvdlm.models.llama import load_hf_
from hvdlm.parallel import STRATEGIES, StepPlan, Strategy, Wish
from hvdlm.run import checkpoint, exit_record, ledger, restore, stop
from hvdlm.run.folder import CHECKPOINTS
from hvdlm.run.pace import Pace
from hvdlm.run.profile import Profile
from hvdlm.run.progress import Progress
from hvdlm.run.saver import Saver
from hvdlm.train.agree import Agreed
from hvdlm.train.carry import Elastic, Places, shared_read
from hvdlm.train.checks import BlockChecks, begin_checks
from hvdlm.train.guards import check_same_parameters
from hvdlm.train.headline import headline, sizes
from hvdlm.train.reports import Reports, open_reports
from hvdlm.train.staging import Wanted, stage_in


@dataclass(frozen=True)
class Session:
    """One attempt of a run; only rank 0 has `reports`. `sources` are where this rank reads from.

    In an elastic run a world is an attempt, and `member` the way to the driver.
    """

    config: RunConfig
    steps: int
    run_folder: Path
    agreed: Agreed
    ranks: World
    sources: list[Source]
    loader: Loader
    strategy: Strategy
    watch: stop.StopWatch
    checks: BlockChecks
    saver: Saver
    pace: Pace
    profile: Profile
    progress: Progress
    reports: Reports | None
    member: Places | None

    def wish(self) -> Wish:
        """What this rank says in the step it is in; while a save is in flight no other is asked for."""
        save = (self.watch.save_requested or self.pace.due) and not self.saver.in_flight
        resize = False
        if self.member:
            self.watch.ask(self.member.stop)
            resize = self.member.resize
        return Wish(self.watch.requested, save, self.saver.writing, resize)

    def check_lease(self) -> None:
        """On rank 0: is the run still this start's?

        Raises:
            UserError: another start took over.
        """
        if self.agreed.lease:
            self.agreed.lease.check()

    def before_commit(self) -> None:
        """On rank 0: the run is still this start's, and the ledger of what is committed is durable.

        Raises:
            UserError: another start took over, or the file system refuses.
        """
        self.check_lease()
        if self.reports:
            try:
                self.reports.ledger.sync()
            except OSError as error:
                raise unwritable(self.run_folder / ledger.FILE_NAME, error) from error

    def close(self) -> None:
        """End the threads and close the files."""
        self.profile.close()
        self.loader.close()
        self.checks.close()
        # One that is in flight is that of a world that broke.
        self.saver.abandon()
        self.saver.close()
        if self.reports:
            self.reports.ledger.close()
            self.reports.metrics.close()
        self.agreed.close()
        self.watch.close()


def open_session(
    config: RunConfig, run_folder: Path, ranks: World, agreed: Agreed, *, elastic: Elastic | None = None
) -> Session:
    """Build loader, model and strategy, and load the checkpoint or what is in memory, where there is one.

    Args:
        config: of the run.
        run_folder: of the run.
        ranks: of this attempt.
        agreed: between them.
        elastic: what a worker of an elastic run has besides.

    Raises:
        AgreedError: there is no room for the checkpoints.
        UserError: this rank's part of the data is damaged, or a checkpoint does not fit the model.

    Collective: yes.
    """
    start = agreed.start
    if ranks.is_root:
        _mark_running(run_folder, agreed)
    ranks.barrier(name="session.folder")
    watch = _open_watch(config, run_folder, agreed, ranks, member=elastic.member if elastic else None)
    sources, notes = _stage(config, agreed, ranks, watch)
    loader = _open_loader(config, agreed, sources, ranks)
    # What is staged was compared with its digests to the last byte.
    when = config.data.verify if sources == agreed.sources else "off"
    checks = begin_checks(when, sources, known=start.verified, ranks=ranks, watch=watch)
    notes += checks.notes
    resumed = bool(start.checkpoint) or agreed.progress is not None
    model = build_model(config, agreed.tokenizer, ranks, resumed=resumed)
    _check_space(config, run_folder, ranks, model=model)
    strategy = _build_strategy(
        config, model, ranks, agreed=agreed, tensors=elastic.tensors if elastic else {}
    )
    profile = Profile(run_folder, steps=config.log.profile, attempt=start.attempt, rank=ranks.rank)
    notes += profile.notes(start.step, total_steps(config))
    reports = None
    if ranks.is_root:
        reports = open_reports(config, run_folder, start, ranks=ranks, model=model)
        about_data = sizes(config, agreed.sources, start, windows=loader.windows, ranks=ranks)
        # Of every further world of an elastic run this is known.
        about_data = [] if agreed.progress else about_data
        for line in [*headline(config, run_folder, start, ranks=ranks, model=model), *about_data, *notes]:
            reports.metrics.say(line)
    return Session(
        config=config,
        steps=total_steps(config),
        run_folder=run_folder,
        agreed=agreed,
        ranks=ranks,
        sources=sources,
        loader=loader,
        strategy=strategy,
        watch=watch,
        checks=checks,
        saver=Saver(run_folder / CHECKPOINTS, ranks, files=agreed.carried),
        pace=Pace(3600 * config.checkpoint.mtbf_h if ranks.is_root else 0.0),
        profile=profile,
        progress=agreed.progress or Progress(start.step, start.step, start.course, start.best),
        reports=reports,
        member=elastic.member if elastic else None,
    )


def _open_watch(
    config: RunConfig, run_folder: Path, agreed: Agreed, ranks: World, *, member: Places | None
) -> stop.StopWatch:
    return stop.StopWatch(
        run_folder,
        attempt=agreed.start.attempt,
        watch_file=ranks.is_root,
        deadline_unix=stop.deadline(agreed.job_end_unix, config.train.stop_margin_s),
        signals=member.signals if member else stop.SIGNALS,
    )


def batch_plan(config: RunConfig) -> BatchPlan:
    """What a step consists of."""
    data, train = config.data, config.train
    return BatchPlan(
        data.seq_len,
        train.global_batch,
        train.micro_batch,
        train.seed,
        shuffle_mb=data.shuffle_mb,
        document_mask=data.document_mask,
    )


def _mark_running(run_folder: Path, agreed: Agreed) -> None:
    for name, content in agreed.carried.items():
        write_atomic(run_folder / name, content)
    start = agreed.start
    step = agreed.progress.saved_step if agreed.progress else start.step
    fruitless = start.starts_without_progress
    exit_record.write(
        run_folder, "running", attempt=start.attempt, step=step, starts_without_progress=fruitless
    )


def _stage(
    config: RunConfig, agreed: Agreed, ranks: World, watch: stop.StopWatch
) -> tuple[list[Source], list[str]]:
    """Where this rank reads the data from, and lines for the user."""
    if not config.data.stage:
        return agreed.sources, []
    wanted = Wanted(
        agreed.sources,
        agreed.start.stages[-1].blend,
        config.data.stage,
        batch_plan(config),
        start_step=agreed.start.step,
        end_step=total_steps(config),
        val=config.eval.batches > 0,
    )
    sources, note = stage_in(wanted, ranks, wants_stop=lambda: watch.requested)
    return sources, [note]


def _open_loader(config: RunConfig, agreed: Agreed, sources: list[Source], ranks: World) -> Loader:
    return Loader(
        sources,
        "train",
        blend=agreed.start.stages[-1].blend,
        plan=batch_plan(config),
        share=(ranks.rank, ranks.size),
        prefetch_steps=config.data.prefetch,
        check_sizes=sources == agreed.sources,
    )


def build_model(config: RunConfig, tokenizer: TokenizerInfo, ranks: World, *, resumed: bool) -> nn.Module:
    """The model on its device; its initial weights are those of rank 0.

    Args:
        config: of the run.
        tokenizer: of its data.
        ranks: of the run.
        resumed: a checkpoint's weights replace the initial ones, so `model.init` is not needed.

    Raises:
        AgreedError: `model.init` is no Llama model of this shape, or Horovod cannot sum over these GPUs.
        UserError: there is no such device, or no compiler for `model.compile`.

    Collective: yes.
    """
    torch.manual_seed(config.train.seed)
    model = MODELS[config.model.kind](config.model, pad_vocab(tokenizer.vocab_size))
    if config.model.init != "random" and not resumed:
        # On rank 0 alone: the strategy broadcasts its weights.
        ranks.on_root(lambda: load_hf_(model, Path(config.model.init)), name="session.init")
    where = device.pick(config.train.device, ranks.local_rank)
    device.require_reductions(ranks, where)
    model = model.to(where)
    if config.model.compile:
        compile_blocks_(model)
    return model


def _check_space(config: RunConfig, run_folder: Path, ranks: World, *, model: nn.Module) -> None:
    folder = run_folder / CHECKPOINTS

    def check() -> None:
        # First: what a killed start left half written may be what fills the disk.
        checkpoint.delete_unfinished(folder)
        checkpoint.check_space(folder, config.checkpoint, model)

    ranks.on_root(check, name="session.space")


def _build_strategy(
    config: RunConfig, model: nn.Module, ranks: World, *, agreed: Agreed, tensors: Mapping[str, torch.Tensor]
) -> Strategy:
    slots = share_of(config.train.global_batch // config.train.micro_batch, (ranks.rank, ranks.size))
    plan = StepPlan(config.optim, config.parallel, config.train.precision, len(slots))
    strategy = STRATEGIES[config.parallel.strategy](model, ranks, plan)
    if agreed.progress:
        strategy.load(shared_read(tensors, ranks))
    elif agreed.start.checkpoint:
        strategy.load(restore.reopen(Path(agreed.start.checkpoint)).read)
    check_same_parameters(strategy, ranks, step=agreed.start.step)
    return strategy
