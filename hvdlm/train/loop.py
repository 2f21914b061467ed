"""THE LOOP."""

from __future__ import annotations

from dataclasses import asdict

import torch

from hvdlm import __version__
from hvdlm.comm.world import AgreedError
from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_REQUEUE, UserError
from hvdlm.config.parse import keys
from hvdlm.data.loader import evaluation_batches
from hvdlm.run import checkpoint, exit_record, folder, stop
from hvdlm.run.evaluation import mean_loss
from hvdlm.run.schedule import learning_rate
from hvdlm.train.session import Session, batch_plan

_MAX_SKIPPED_IN_A_ROW = 10


def train(s: Session) -> int:
    """From the last checkpoint, or from nothing, to the last step or a wish to stop.

    Returns:
        EXIT_DONE, or EXIT_REQUEUE with a committed checkpoint.

    Raises:
        AgreedError: the loss is no number any more, or a checkpoint cannot be written.
        UserError: this rank's data is damaged.

    Collective: yes.
    """
    if s.agreed.start.step == 0:
        _validate(s, 0)
    skipped_in_a_row, best = s.agreed.start.skipped_in_a_row, s.agreed.start.best
    for batch in s.profile.steps(s.loader.steps(s.agreed.start.step)):
        lr = learning_rate(batch.step, s.config.optim, s.steps)
        with s.profile.phase("step"):
            stats = s.strategy.step(batch, lr, wish=s.wish)
        done = batch.step == s.steps
        if s.reports:
            s.reports.ledger.add(batch, world_size=s.ranks.size)
            s.reports.metrics.train(batch.step, stats, lr, show=done or _due(batch.step, s.config.log.every))
        skipped_in_a_row = skipped_in_a_row + 1 if stats.skipped else 0
        _check(s, batch.step, skipped_in_a_row, last=done)
        val_loss = _validate(s, batch.step) if done or _due(batch.step, s.config.eval.every) else None
        if done or any(stats.wish) or _due(batch.step, s.config.checkpoint.every):
            best = checkpoint.rank_best(best, batch.step, val_loss, count=s.config.checkpoint.keep_best)
            with s.profile.phase("save"):
                _save(s, batch.step, skipped_in_a_row=skipped_in_a_row, best=best)
        if done or stats.wish.stop:
            return _finish(s, batch.step, EXIT_DONE if done else EXIT_REQUEUE)
    raise AssertionError("the loader is endless")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check(s: Session, step: int, skipped_in_a_row: int, *, last: bool) -> None:
    """Stop before more harm is done, or calling it done."""
    if skipped_in_a_row >= (1 if last else _MAX_SKIPPED_IN_A_ROW):
        raise AgreedError(
            f"step {step}: loss or gradient not finite {skipped_in_a_row} time(s) in a row; lower optim.lr "
            f"or lengthen optim.warmup_steps, and begin anew or from a checkpoint in {s.run_folder}",
            EXIT_CRASH,
        )
    if problem := s.checks.problem():
        raise UserError(problem)


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


def _save(s: Session, step: int, *, skipped_in_a_row: int, best: checkpoint.Best) -> None:
    if s.reports:
        s.reports.ledger.sync()
    state = {
        "step": step,
        "samples": step * s.config.train.global_batch,
        "tokens": step * s.config.train.global_batch * s.config.data.seq_len,
        "skipped_in_a_row": skipped_in_a_row,
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
    checkpoints = s.run_folder / folder.CHECKPOINTS
    s.ranks.on_root(s.check_lease, name="save.lease")
    checkpoint.save(checkpoints, s.strategy.pieces(), s.ranks, state=state, files=s.agreed.carried)
    if s.reports:
        checkpoint.prune(checkpoints, s.config.checkpoint, best=best)
        if s.watch.take_save_file():
            s.reports.metrics.say(f"saved after step {step} (file {s.run_folder / stop.SAVE_FILE})")
        s.reports.metrics.restart_clock()


def _finish(s: Session, step: int, exit_code: int) -> int:
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
        s.reports.metrics.say(f"done: {step} steps; next: python -m hvdlm.evaluate {s.run_folder}")
        exit_record.write(
            s.run_folder, "done", attempt=s.agreed.start.attempt, step=step, exit_code=exit_code
        )
    s.close()
    return exit_code
