"""What ends a run before more harm is done: steps that update nothing, ranks that no longer agree."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_CRASH, TrainConfig
from hvdlm.parallel.strategy import StepStats, Strategy
from hvdlm.run.course import Course
from hvdlm.run.spikes import WINDOW, is_spike


def check_skipped(
    stats: StepStats, course: Course, train: TrainConfig, *, step: int, last: bool, run_folder: Path
) -> None:
    """End a run that does not train any more.

    Args:
        stats: of the step.
        course: with this step.
        train: the section.
        step: that was done.
        last: the run would end as done; not after a step that was not finite.
        run_folder: for the message.

    Raises:
        AgreedError: too many steps in a row updated nothing.
    """
    count, spike = course.skipped_in_a_row, is_spike(stats)
    if count < (1 if last and not spike else train.max_skipped):
        return
    if spike:
        raise AgreedError(
            f"step {step}: {count} steps in a row updated nothing, this one for a loss of {stats.loss:.4f}, "
            f"above mean + {train.spike_sigmas:g} sigma of the last {WINDOW}; if the new losses are right "
            f"(as after a change of data), start again with --train.spike_sigmas 0, else begin from an older "
            f"checkpoint in {run_folder}",
            EXIT_CRASH,
        )
    raise AgreedError(
        f"step {step}: loss or gradient not finite {count} time(s) in a row; lower optim.lr "
        f"or lengthen optim.warmup_steps, and begin anew or from a checkpoint in {run_folder}",
        EXIT_CRASH,
    )


def check_same_parameters(strategy: Strategy, ranks: World, *, step: int) -> None:
    """See that all ranks hold the same parameters.

    Args:
        strategy: that holds them.
        ranks: of the run.
        step: that was done.

    Raises:
        AgreedError: a processor or its memory changed them on some rank.

    Collective: yes.
    """
    if ranks.size == 1:
        return
    of_ranks = ranks.gather_json([strategy.digest(), socket.gethostname()], name="guards.digests")
    counts = Counter(found for found, _ in of_ranks).most_common()
    if len(counts) == 1:
        return
    is_split = counts[1][1] == counts[0][1]
    suspects = [
        f"rank {rank} on {host}"
        for rank, (found, host) in enumerate(of_ranks)
        if is_split or found != counts[0][0]
    ]
    who = " and ".join(suspects) if len(suspects) < 9 else f"{', '.join(suspects[:8])} and others"
    raise AgreedError(
        f"step {step}: silent corruption: the parameters of {who} "
        f"{'differ, and which are right is not known' if is_split else 'differ from all others'}"
        "; this was not saved: start again without that node. Where nodes have several kinds of processors, "
        "ranks may drift apart without damage: --train.digest_every 0 compares nothing",
        EXIT_CRASH,
    )
