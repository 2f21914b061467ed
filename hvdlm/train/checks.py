"""The verification of data sets over all attempts of a run: which blocks were ever found intact."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_REQUEUE
from hvdlm.data.intervals import Intervals, merge, size
from hvdlm.data.sources import Source
from hvdlm.data.verify import BackgroundVerifier, block_count, require_intact
from hvdlm.run.stop import StopWatch
from hvdlm.train.together import agree, listening

Known: TypeAlias = dict[str, Intervals]
"""Blocks that were found intact, of each data set by its fingerprint."""


@final
@dataclass(frozen=True)
class BlockChecks:
    """What is known of the blocks of a run's sources, and this rank's thread that finds out more.

    Attributes:
        known: what was known before that thread started.
        sources: what the thread goes through, in its order.
        verifier: the thread; None where nothing is left to it.
        notes: lines for the user.
    """

    known: Known
    sources: Sequence[Source] = ()
    verifier: BackgroundVerifier | None = None
    notes: list[str] = field(default_factory=list)

    def problem(self) -> str | None:
        """The first bad block that this rank has found, with the cure; None so far."""
        return self.verifier.problem() if self.verifier else None

    def gather(self, ranks: World) -> Known:
        """The blocks that any rank of any attempt has found intact so far.

        Collective: yes.
        """
        own = self.verifier.intact() if self.verifier else []
        everywhere = ranks.gather_json(own, name="checks.intact")
        found = dict(self.known)
        for index, source in enumerate(self.sources):
            key = source.manifest.fingerprint
            # A rank whose share is empty has a thread all the same, so every list is as long.
            intact = (interval for of_rank in everywhere for interval in of_rank[index])
            found[key] = merge([*found.get(key, []), *intact])
        return found

    def left(self, found: Known) -> str:
        """Of a run that is done: a line on the blocks that nobody came to; "" = there are none.

        Args:
            found: what was gathered.
        """
        unread = [
            (source.folder, block_count(source.manifest) - size(found[source.manifest.fingerprint]))
            for source in self.sources
        ]
        folders = " ".join(shlex.quote(str(folder)) for folder, count in unread if count)
        if not folders:
            return ""
        blocks = sum(count for _, count in unread)
        return f"verification: {blocks:,} block(s) were not reached; python -m hvdlm.dataset verify {folders}"

    def close(self) -> None:
        """End the thread."""
        if self.verifier:
            self.verifier.close()


def begin_checks(
    when: str, sources: Sequence[Source], *, known: Known, ranks: World, watch: StopWatch
) -> BlockChecks:
    """Check this rank's share of the sources' blocks: now, in a thread, or not.

    Args:
        when: `data.verify`. "before" reads every block again, as a file can rot since it was read.
        sources: the data sets.
        known: blocks that earlier attempts found intact; a thread leaves them out.
        ranks: who share the others, however many they were earlier.
        watch: whether this rank should stop, asked by "before": nothing is trained on then.

    Raises:
        AgreedError: on all ranks, where "before" found a bad block on one, or one wishes to stop.

    Collective: yes.
    """
    share = (ranks.rank, ranks.size)
    if when == "before":

        def compare(stop: threading.Event) -> bool:
            for source in sources:
                require_intact(source, share=share, stop=stop)
            return not stop.is_set()

        whole = agree(
            lambda: listening(compare, ranks, wants_stop=lambda: watch.requested, name="checks.progress"),
            ranks,
            name="checks.before",
        )
        if not all(whole):
            # A rank that was asked to stop would take what rank 0 records for its failure, and leave with 1.
            watch.close()
            ranks.barrier(name="checks.left")
            raise AgreedError(
                "stopped while data.verify = before read the data; the same command begins again",
                EXIT_REQUEUE,
            )
        return BlockChecks({s.manifest.fingerprint: [[0, block_count(s.manifest)]] for s in sources})
    if when == "off":
        return BlockChecks(known)
    of_sources = [known.get(source.manifest.fingerprint, []) for source in sources]
    done, blocks = sum(map(size, of_sources)), sum(block_count(source.manifest) for source in sources)
    percent = 100 * done // blocks
    notes = [f"verification: {percent} % known from earlier attempts"] if percent else []
    if done == blocks:
        return BlockChecks(known, notes=notes)
    verifier = BackgroundVerifier(sources, share=share, known=of_sources)
    return BlockChecks(known, sources, verifier, notes)
