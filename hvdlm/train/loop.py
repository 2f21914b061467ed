"""THE LOOP."""

from __future__ import annotations

from dataclasses import asdict

import torch

from hvdlm import __version__
from hvdlm.config import EXIT_DONE, EXIT_REQUEUE, UserError
from hvdlm.config.parse import keys
from hvdlm.data.loader import StepBatch, evaluation_batches
from hvdlm.parallel.strategy import StepStats
from hvdlm.run import checkpoint, exit_record, folder, stop
from hvdlm.run.course import Course
from hvdlm.run.evaluation import mean_loss
from hvdlm.run.schedule import learning_rate
from hvdlm.run.spikes import loss_limit
from hvdlm.train.guards import check_same_parameters, check_skipped
from hvdlm.train.pulse import Pulse
from hvdlm.train.session import Session, batch_plan


def train(s: Session) -> int:
    """From the last checkpoint, or from nothing, to the last step or a wish to stop.

    Returns:
        EXIT_DONE, or EXIT_REQUEUE with a committed checkpoint.

    Raises:
        AgreedError: steps update nothing any more, the ranks hold different parameters, or a checkpoint
            cannot be written.
        UserError: this rank's data is damaged.

    Collective: yes.
    """
    if s.agreed.start.step == 0:
        _validate(s, 0)
    course, best, pulse = s.agreed.start.course, s.agreed.start.best, Pulse(s.ranks, s.wish)
    for batch in s.profile.steps(s.loader.steps(s.agreed.start.step)):
        lr = learning_rate(batch.step, s.config.optim, s.steps, scale=course.plateau.scale)
        limit = loss_limit(course.losses, s.config.train.spike_sigmas)
        with s.profile.phase("step"):
            stats = s.strategy.step(batch, lr, wish=pulse.begin_step(len(batch.slots)), loss_limit=limit)
        course, done = course.after(stats), batch.step == s.steps
        _report(s, batch, stats, lr, pulse=pulse)
        if stats.skipped or not stats.wish.writing:
            _commit(s)
        check_skipped(stats, course, s.config.train, step=batch.step, last=done, run_folder=s.run_folder)
        if problem := s.checks.problem():
            raise UserError(problem)
        val_loss = _validate(s, batch.step) if done or _due(batch.step, s.config.eval.every) else None
        if _due(batch.step, s.config.eval.every):
            course = course.validated(batch.step, val_loss, s.config.optim)
        done = done or course.plateau.finished
        leaves = done or stats.wish.stop
        saves = leaves or stats.wish.save or _due(batch.step, s.config.checkpoint.every)
        if s.config.train.digest_every and (saves or _due(batch.step, s.config.train.digest_every)):
            # What is in flight was compared when it was copied.
            _commit(s)
            check_same_parameters(s.strategy, s.ranks, step=batch.step)
        if saves:
            best = checkpoint.rank_best(best, batch.step, val_loss, count=s.config.checkpoint.keep_best)
            with s.profile.phase("save"):
                _save(s, batch.step, course=course, best=best, asked=leaves or stats.wish.save)
        if leaves:
            _commit(s)
            return _finish(s, batch.step, EXIT_DONE if done else EXIT_REQUEUE, course=course)
    raise AssertionError("the loader is endless")


def _report(s: Session, batch: StepBatch, stats: StepStats, lr: float, *, pulse: Pulse) -> None:
    """The step's rows; at a log line also what the ranks tell of themselves."""
    show = batch.step == s.steps or _due(batch.step, s.config.log.every)
    more = pulse.beat() if show else {}
    if not s.reports:
        return
    s.reports.ledger.add(batch, world_size=s.ranks.size)
    s.reports.metrics.train(batch.step, stats, lr, show=show, more=more)
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
    if saved and s.reports:
        s.reports.metrics.saved(saved.step, saved.seconds, size_bytes=saved.size_bytes)
        checkpoints, best = s.run_folder / folder.CHECKPOINTS, saved.state["best"]
        s.saver.delete(checkpoint.prune(checkpoints, s.config.checkpoint, best=best))
        if saved.asked and s.watch.take_save_file():
            s.reports.metrics.say(f"saved after step {saved.step} (file {s.run_folder / stop.SAVE_FILE})")


def _finish(s: Session, step: int, exit_code: int, *, course: Course) -> int:
    """Say how it ended, to the user and in exit.json."""
    reasons = [r for r in s.ranks.gather_json(s.watch.reason, name="finish.reasons") if r]
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
            f"done: {step} steps{skipped}{why}; next: python -m hvdlm.evaluate {s.run_folder}"
        )
        exit_record.write(
            s.run_folder,
            "done",
            attempt=s.agreed.start.attempt,
            step=step,
            exit_code=exit_code,
            reason=exit_record.PLATEAU if course.plateau.finished else exit_record.ALL_STEPS,
        )
    s.close()
    return exit_code
