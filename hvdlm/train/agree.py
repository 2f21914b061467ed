"""What all ranks of an attempt know before they build anything: read by rank 0, and told to the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.comm.world import AgreedError, LostPeerError, World
from hvdlm.config import RunConfig, total_steps
from hvdlm.config.parse import keys, to_toml
from hvdlm.data.manifest import Manifest, TokenizerInfo, read_tokenizer
from hvdlm.data.sources import Source, read_sources, window_counts
from hvdlm.parallel.choice import FILE
from hvdlm.run.folder import Start, discard_empty, make_folder, open_run
from hvdlm.run.lease import BorrowedLease, Lease
from hvdlm.run.progress import Progress
from hvdlm.run.stages import StageSource, check_epochs
from hvdlm.train.carry import Carry


@dataclass(frozen=True)
class Agreed:
    """What all ranks know before they build anything.

    `carried` are the small files that every checkpoint takes along, by name. `job_end_unix` is when
    the job ends, in seconds since 1970; 0 where it has no end. Only rank 0 has the `lease`. `progress`
    is how far the run is in rank 0's memory; None where it begins, or goes on from a checkpoint.
    """

    start: Start
    sources: list[Source]
    carried: dict[str, bytes]
    job_end_unix: float
    lease: Lease | BorrowedLease | None
    progress: Progress | None = None

    def close(self) -> None:
        """Give the run folder free."""
        if self.lease:
            self.lease.release()

    @property
    def tokenizer(self) -> TokenizerInfo:
        """That of every source."""
        return self.sources[0].manifest.tokenizer


def agree_on_start(
    config: RunConfig,
    run_folder: Path,
    ranks: World,
    *,
    job_end_unix: float = 0.0,
    lease: BorrowedLease | None = None,
    carry: Carry | None = None,
) -> Agreed:
    """Read the manifests and the run folder on rank 0, and tell all ranks what it knows.

    Args:
        config: of the run.
        run_folder: of the run.
        ranks: of this attempt.
        job_end_unix: when the job ends, as rank 0 knows it.
        lease: what an elastic run's driver holds for its workers; None = rank 0 takes one of its own.
        carry: how far the run is in memory; rank 0's counts.

    Raises:
        AgreedError: a data set is missing or damaged, or would be read too often, or the run cannot
            go on so.

    Collective: yes.
    """
    strategies = ranks.gather_json(config.parallel.strategy, name="start.strategy")
    if len(set(strategies)) > 1:
        raise AgreedError(
            f"parallel.strategy auto: ranks found {', '.join(sorted(set(strategies)))}, needed one for all; "
            f"{FILE} is not the same on all nodes: share that folder, or name a strategy"
        )
    leases: list[Lease | BorrowedLease] = []

    def read() -> dict[str, Any]:
        sources = read_sources(config.data.weights)
        first = sources[0]
        make_folder(run_folder)
        leases.append(lease or Lease(run_folder))
        start = carry.start(run_folder) if carry else _open_run(config, run_folder, sources)
        return {
            "sources": [(str(source.folder), source.manifest.to_json()) for source in sources],
            "start": start.to_json(),
            "tokenizer": read_tokenizer(first.folder, first.manifest.tokenizer).decode(),
            "job_end_unix": job_end_unix,
            "progress": carry.progress.to_record() if carry else None,
        }

    try:
        agreed = ranks.on_root(read, name="start.agree")
    except (AgreedError, LostPeerError):
        for held in leases:
            held.release()
            discard_empty(run_folder)
        raise
    carried = {"config.toml": to_toml(config).encode(), "tokenizer.json": agreed["tokenizer"].encode()}
    sources = [Source(Path(folder), Manifest.from_json(text)) for folder, text in agreed["sources"]]
    progress = agreed["progress"]
    return Agreed(
        Start.from_json(agreed["start"]),
        sources,
        carried,
        agreed["job_end_unix"],
        leases[0] if leases else None,
        progress=Progress.from_record(progress) if progress else None,
    )


def _open_run(config: RunConfig, run_folder: Path, sources: list[Source]) -> Start:
    """How the run starts, once it is known that no source will be read too often."""
    start = open_run(
        run_folder,
        resume=config.checkpoint.resume,
        config=keys(config),
        tokenizer=sources[0].manifest.tokenizer.sha256,
        sources=tuple(
            StageSource(folder, source.manifest.fingerprint, weight, folder=str(Path(folder).resolve()))
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
