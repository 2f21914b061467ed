"""What every task of a data set has in common, and what is counted while they are done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvdlm.corpus.plan import Task
from hvdlm.corpus.readers import ReadOptions
from hvdlm.data.entries import TokenizerInfo
from hvdlm.data.files import publishing, write_atomic
from hvdlm.text import fast, tokenizer
from hvdlm.text.tokenizer import Tokenizer

TOKENIZER_NAME, ENCODER_NAME = "tokenizer.json", "encoder.json"
REJECTS_NAME = "rejects.jsonl"
PLAN_NAME, OFFSETS_NAME = "plan.jsonl", "plan.offsets"


class Tally(NamedTuple):
    """Newly read bytes (of the plan's weights), the documents, tokens and rejects among them, tasks done."""

    read_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    rejected: int = 0
    tasks: int = 0


Report = Callable[[Tally], None]


@dataclass(frozen=True)
class Keep:
    """Which documents are kept.

    Attributes:
        min_chars: shorter ones are rejected.
        max_chars: longer ones are rejected; 0 = none is too long.
        max_errors: bad records that are rejected before the run fails; 0 = the first one ends it.
        dedup: of equal documents only the first in plan order is kept.
    """

    min_chars: int = 0
    max_chars: int = 0
    max_errors: int = 0
    dedup: bool = False


@dataclass(frozen=True)
class Job:
    """What every task of a run has in common.

    Attributes:
        folder: where tasks write; it holds the plan and the tokenizer's file.
        eos: name of the token that ends a document, or "" for the usual ones.
        read: how documents are read.
        keep: which are kept.
        val_fraction: share of documents that goes to validation, 0..1.
        shard_tokens: tokens a shard at most.
        seed: of the order of documents.
    """

    folder: Path
    eos: str = ""
    read: ReadOptions = field(default_factory=ReadOptions)
    keep: Keep = field(default_factory=Keep)
    val_fraction: float = 0.05
    shard_tokens: int = 64 << 20
    seed: int = 0

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the job's folder, with the encoder that was chosen for all.

        Raises:
            UserError: this machine lacks the chosen encoder.
        """
        reference = tokenizer.load(self.folder / TOKENIZER_NAME, eos=self.eos)
        return fast.follow(reference, self.choice or fast.REFERENCE)

    @property
    def choice(self) -> fast.Choice | None:
        """Which encoder was chosen for all; None = there was no choice."""
        path = self.folder / ENCODER_NAME
        choice: fast.Choice | None = json.loads(path.read_bytes()) if path.exists() else None
        return choice

    def write_choice(self, choice: fast.Choice) -> None:
        """Tell all processes which encoder to use.

        Raises:
            UserError: the disk is full.
        """
        write_atomic(self.folder / ENCODER_NAME, json.dumps(choice).encode())

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        """What shards and manifest say of it."""
        own = self.tokenizer
        return TokenizerInfo(TOKENIZER_NAME, own.fingerprint, own.vocab_size, own.eos_id)

    def task(self, index: int) -> Task:
        """A task of the plan: one line of a file, so that nobody reads more of it than its own part."""
        with (self.folder / PLAN_NAME).open("rb") as file:
            first, end = np.fromfile(self.folder / OFFSETS_NAME, "<i8", 2, offset=8 * index).tolist()
            file.seek(first)
            return Task.from_json(json.loads(file.read(end - first)))

    def write_plan(self, tasks: list[Task]) -> None:
        """Write the plan.

        Raises:
            UserError: the disk is full.
        """
        offsets = [0]
        with publishing(self.folder / PLAN_NAME) as temp, temp.open("xb") as file:
            for task in tasks:
                offsets.append(offsets[-1] + file.write(json.dumps(asdict(task)).encode() + b"\n"))
        write_atomic(self.folder / OFFSETS_NAME, np.array(offsets, "<i8").tobytes())
