"""One process's stage before the documents are encoded: which tokenizer, and which program encodes by it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from hvdlm.corpus import memory
from hvdlm.corpus.job import ENCODER_NAME, TOKENIZER_NAME, Job
from hvdlm.corpus.options import Options
from hvdlm.corpus.progress import Progress
from hvdlm.corpus.training_text import sample_texts, share_bytes, training_texts
from hvdlm.corpus.work import Work
from hvdlm.data.files import write_atomic
from hvdlm.text import TOKENIZERS, fast
from hvdlm.text import tokenizer as tokenizers
from hvdlm.text.tokenizer import from_library

FAST_FROM_BYTES = 64 << 20
"""Input from which the fast encoder is tried: proving that its ids are equal takes some seconds."""


def provide(options: Options, job: Job, opened: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train the tokenizer, where none was given, and choose the encoder for all processes.

    Args:
        options: of the data set.
        job: common to all tasks; both are written into its folder.
        opened: what the stage before found: the plan's `tasks` and `bytes`, whether a tokenizer was `given`,
            the `vocab_size` of one that was not.
        progress: shows how it goes.

    Returns:
        JSON: the `seconds` it took.

    Raises:
        UserError: input that cannot be read or gives no tokenizer, or a full disk.
    """
    begun = time.monotonic()
    if not opened["given"]:
        builder = TOKENIZERS[options.tokenizer]
        texts: Iterator[str] = iter(())
        if options.tokenizer != "byte":
            count, total_bytes = opened["tasks"], opened["bytes"]
            share = share_bytes(count, total_bytes)
            progress.stage(
                f"train {options.tokenizer} tokenizer",
                count=count,
                total_bytes=min(total_bytes, share * count),
            )
            texts = training_texts(job, count, total_bytes=total_bytes, report=progress)
        trained = from_library(builder(texts, opened["vocab_size"]))
        write_atomic(job.folder / TOKENIZER_NAME, trained.json_bytes)
        memory.give_back()
    if options.encoder == "auto" and opened["bytes"] >= FAST_FROM_BYTES:
        reference = tokenizers.load(job.folder / TOKENIZER_NAME, eos=job.eos)
        choice = fast.check(reference, sample_texts(job, opened["tasks"]))
        if fast.line(choice):
            print(f"hvdlm preprocess: {fast.line(choice)}", file=sys.stderr, flush=True)
        job.write_choice(choice)
        del reference
        memory.give_back()
    return {"seconds": time.monotonic() - begun}


def forget_choice(work: Work) -> None:
    """Drop the fast encoder that an earlier start chose, and what it has encoded."""
    path = work.folder / ENCODER_NAME
    if path.exists():
        for index in work.done("encode"):
            work.forget("encode", index)
        path.unlink()
