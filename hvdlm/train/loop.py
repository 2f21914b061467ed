"""THE LOOP."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass

import torch

from hvdlm import __version__
from hvdlm.comm.torch_group import close_group
from hvdlm.comm.world import AgreedError
from hvdlm.config import EXIT_DONE, EXIT_REQUEUE, EXIT_USAGE, UserError
from hvdlm.config.parse import keys
from hvdlm.data.loader import StepBatch, evaluation_batches
from hvdlm.parallel.strategy import StepStats
from hvdlm.run import checkpoint, exit_record, folder, stop
from hvdlm.run.course import Course
from hvdlm.run.evaluation import mean_loss
from hvdlm.run.ledger import row_of
from hvdlm.run.progress import Progress
from hvdlm.run.schedule import learning_rate
from hvdlm.run.spikes import loss_limit
from hvdlm.train.guards import check_same_parameters, check_skipped
from hvdlm.train.pulse import Pulse
from hvdlm.train.session import Session, batch_plan


def train(s: Session) -> int | None:
    """From the last checkpoint, or from nothing, to the last step or a wish to stop.

    Returns:
        EXIT_DONE, or EXIT_REQUEUE with a committed checkpoint; None where an elastic run goes on in
        another world.

    Raises:
        AgreedError: steps update nothing any more, the ranks hold different parameters, or a checkpoint
            cannot be written.
        LostPeerError: another rank is gone.
        UserError: this rank's data is damaged.

    Collective: yes.
    """
    now, pulse = s.progress, Pulse(s.ranks, s.wish)
    if now.step == 0:
        _validate(s, 0)
    elif s.reports and now.stats and s.reports.metrics.last_step < now.step:
        # The rank 0 that did it did not live to tell.
        s.reports.metrics.train(now.step, now.stats, now.lr, show=False, more={})
    if now.stats and not now.is_settled and (ended := _after_step(s, now, now.stats)):
        return ended.exit_code
    for batch in s.profile.steps(s.loader.steps(now.step)):
        lr = learning_rate(batch.step, s.config.optim, s.steps, scale=now.course.plateau.scale)
        limit = loss_limit(now.course.losses, s.config.train.spike_sigmas)
        with s.profile.phase("step"):
            stats = s.strategy.step(batch, lr, wish=pulse.begin_step(len(batch.slots)), loss_limit=limit)
        now.took(batch.step, stats, lr)
        _report(s, now, batch, pulse=pulse)
        if ended := _after_step(s, now, stats):
            return ended.exit_code
    raise AssertionError("the loader is endless")


@dataclass(frozen=True)
class _Ended:
    """The loop is over: `exit_code` as `train` returns it."""

    exit_code: int | None


def _after_step(s: Session, now: Progress, stats: StepStats) -> _Ended | None:
    """What a step that was done asks for: checks, validation, a save, the end."""
    step, done = now.step, now.step == s.steps
    if stats.skipped or not stats.wish.writing:
        _commit(s)
    check_skipped(stats, now.course, s.config.train, step=step, last=done, run_folder=s.run_folder)
    if problem := s.checks.problem():
        raise UserError(problem)
    course = now.course
    val_loss = _validate(s, step) if done or _due(step, s.config.eval.every) else None
    if _due(step, s.config.eval.every):
        course = course.validated(step, val_loss, s.config.optim)
    done = done or course.plateau.finished
    leaves = done or stats.wish.stop
    # What no rank's memory holds whole goes to the next world by the disk.
    asked = leaves or stats.wish.save or (stats.wish.resize and s.strategy.whole() is None)
    saves = asked or _due(step, s.config.checkpoint.every)
    if s.config.train.digest_every and (saves or _due(step, s.config.train.digest_every)):
        # What is in flight was compared when it was copied.
        _commit(s)
        check_same_parameters(s.strategy, s.ranks, step=step)
    best = now.best
    if saves:
        best = checkpoint.rank_best(best, step, val_loss, count=s.config.checkpoint.keep_best)
        with s.profile.phase("save"):
            _save(s, step, course=course, best=best, asked=asked)
    if leaves or stats.wish.resize:
        _commit(s)
    now.settled(course, best)
    if leaves:
        return _Ended(_finish(s, step, EXIT_DONE if done else EXIT_REQUEUE, course=course))
    return _Ended(None) if stats.wish.resize else None


def _report(s: Session, now: Progress, batch: StepBatch, *, pulse: Pulse) -> None:
    """The step's rows; at a log line also what the ranks tell of themselves."""
    row = row_of(batch, world_size=s.ranks.size, attempt=s.agreed.start.attempt)
    if s.member:
        now.rows.append(row)
    show = batch.step == s.steps or _due(batch.step, s.config.log.every)
    more = pulse.beat() if show else {}
    if not s.reports or now.stats is None:
        return
    s.reports.ledger.add(row)
    s.reports.metrics.train(batch.step, now.stats, now.lr, show=show, more=more)
    for line in pulse.warnings if show else []:
        s.reports.metrics.say(line)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _validate(s: Session, step: int) -> float | None:
    if not s.config.eval.batches:
        return None
    samples = evaluation_batches(
        s.sources,
        "val",
        plan=batch_plan(s.config),
        share=(s.ranks.rank, s.ranks.size),
        limit_batches=s.config.eval.batches,
    )
    with s.profile.phase("validate"):
        loss, _ = mean_loss(s.strategy.loss, samples, s.ranks)
    if s.reports:
        s.reports.metrics.evaluation(step, loss)
        s.reports.metrics.restart_clock()
    return loss


def _save(s: Session, step: int, *, course: Course, best: checkpoint.Best, asked: bool) -> None:
    """Begin a save; one that is still in flight is waited for."""
    _commit(s)
    state = {
        "step": step,
        "samples": step * s.config.train.global_batch,
        "tokens": step * s.config.train.global_batch * s.config.data.seq_len,
        **course.to_record(),
        "best": best,
        "parent": s.agreed.start.parent,
        "attempt": s.agreed.start.attempt,
        "world_size": s.ranks.size,
        "config": keys(s.config),
        "fingerprints": {"tokenizer": s.agreed.tokenizer.sha256},
        "stages": [asdict(stage) for stage in s.agreed.start.stages],
        "verified": s.checks.gather(s.ranks),
        "eos_id": s.agreed.tokenizer.eos_id,
        "versions": {"hvdlm": __version__, "torch": torch.__version__},
    }
    s.pace.begin()
    s.saver.begin(s.strategy.pieces(), state, asked=asked, before=s.check_lease)
    if not s.config.checkpoint.asynchronous:
        _commit(s)
    if s.reports:
        s.reports.metrics.restart_clock()


def _commit(s: Session) -> None:
    """Finish the save that is in flight, where one is."""
    saved = s.saver.finish(before=s.before_commit)
    if saved:
        s.pace.committed(saved.seconds)
        s.progress.saved(saved.step)
    if saved and s.reports:
        s.reports.metrics.saved(saved.step, saved.seconds, size_bytes=saved.size_bytes)
        checkpoints, best = s.run_folder / folder.CHECKPOINTS, saved.state["best"]
        s.saver.delete(checkpoint.prune(checkpoints, s.config.checkpoint, best=best))
        if saved.asked and s.watch.take_save_file():
            s.reports.metrics.say(f"saved after step {saved.step} (file {s.run_folder / stop.SAVE_FILE})")


def _finish(s: Session, step: int, exit_code: int, *, course: Course) -> int:
    """Say how it ended, to the user and in exit.json."""
    unread = s.checks.left(s.checks.gather(s.ranks)) if exit_code == EXIT_DONE else ""
    told = s.ranks.gather_json([s.watch.reason, s.checks.problem()], name="finish.told")
    for problem in (problem for _, problem in told if problem):
        raise AgreedError(problem, EXIT_USAGE)
    reasons = [reason for reason, _ in told if reason]
    if s.reports:
        (s.run_folder / stop.STOP_FILE).unlink(missing_ok=True)
    if s.reports and exit_code == EXIT_REQUEUE:
        s.reports.metrics.say(
            f"stopped after step {step} ({reasons[0]}); the same command goes on from there"
        )
        exit_record.write(
            s.run_folder,
            "stopped",
            attempt=s.agreed.start.attempt,
            step=step,
            exit_code=exit_code,
            reason=reasons[0],
        )
    elif s.reports:
        skipped = f", {course.skipped} of them updated nothing" if course.skipped else ""
        why = "; plateau: at optim.min_lr the validation loss stood still" if course.plateau.finished else ""
        s.reports.metrics.say(
            f"done: {step} steps{skipped}{why}; next: python -m hvdlm.evaluate "
            f"{shlex.quote(str(s.run_folder))}"
        )
        if unread:
            s.reports.metrics.say(unread)
        exit_record.write(
            s.run_folder,
            "done",
            attempt=s.agreed.start.attempt,
            step=step,
            exit_code=exit_code,
            reason=exit_record.PLATEAU if course.plateau.finished else exit_record.ALL_STEPS,
        )
    close_group()
    s.close()
    return exit_code
