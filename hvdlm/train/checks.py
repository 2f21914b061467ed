"""The verification of a data set over all attempts of a run: which blocks were ever found intact."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from hvdlm.comm.world import World
from hvdlm.config import UserError
from hvdlm.data.files import cure
from hvdlm.data.intervals import Intervals, merge, size
from hvdlm.data.manifest import Manifest
from hvdlm.data.verify import BackgroundVerifier, block_count, verify_blocks


@final
@dataclass(frozen=True)
class BlockChecks:
    """What is known of the blocks of one data set, and this rank's thread that finds out more.

    Attributes:
        known: blocks found intact before that thread started.
        verifier: the thread; None where nothing is left to it.
        notes: lines for the user.
    """

    known: Intervals
    verifier: BackgroundVerifier | None = None
    notes: list[str] = field(default_factory=list)

    def problem(self) -> str | None:
        """The first bad block that this rank has found, with the cure; None so far."""
        return self.verifier.problem() if self.verifier else None

    def gather(self, ranks: World) -> Intervals:
        """The blocks that any rank of any attempt has found intact so far.

        Collective: yes.
        """
        own = self.verifier.intact() if self.verifier else []
        everywhere = ranks.gather_json(own, name="checks.intact")
        return merge([*self.known, *(interval for intact in everywhere for interval in intact)])

    def close(self) -> None:
        """End the thread."""
        if self.verifier:
            self.verifier.close()


def begin_checks(
    when: str, folder: Path, manifest: Manifest, *, known: Intervals, ranks: World
) -> BlockChecks:
    """Check this rank's share of a data set's blocks: now, in a thread, or not.

    Args:
        when: `data.verify`. "before" reads every block again, as a file can rot since it was read.
        folder: the data set.
        manifest: its manifest.
        known: blocks that earlier attempts found intact; a thread leaves them out.
        ranks: who share the others, however many they were earlier.

    Raises:
        UserError: "before" found a bad block.
    """
    share, blocks = (ranks.rank, ranks.size), block_count(manifest)
    if when == "before":
        for problem in verify_blocks(folder, manifest, share=share):
            raise UserError(f"{folder / problem.file}: {problem.detail}; {cure(folder)}")
        # The other ranks' blocks too: who finds a bad one ends the run before any checkpoint.
        return BlockChecks([[0, blocks]])
    if when == "off":
        return BlockChecks(known)
    percent = 100 * size(known) // blocks
    notes = [f"verification: {percent} % known from earlier attempts"] if percent else []
    if size(known) == blocks:
        return BlockChecks(known, None, notes)
    return BlockChecks(known, BackgroundVerifier(folder, manifest, share=share, known=known), notes)
