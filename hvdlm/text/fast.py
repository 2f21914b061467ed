"""Whether a run may encode with the fast encoder: decided once, by whoever plans, for all workers.

Processes that decided for themselves could decide differently, and write different bytes. So the
plan holds a choice, and a worker that cannot follow it stops.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from hvdlm.config import EXIT_CRASH, UserError
from hvdlm.text.gigatoken_encoder import PACKAGE, GigatokenEncoder, version
from hvdlm.text.proof import excerpt, first_difference, probes
from hvdlm.text.tokenizer import Tokenizer

Choice = dict[str, str]
"""JSON: `encoder` is "gigatoken" or "reference"; the first has its `version`, the second says `why`."""
SAMPLE_CHARS = 4 << 20
"""Text that is compared at most, in code points."""
REFERENCE: Choice = {"encoder": "reference", "why": ""}


def check(tokenizer: Tokenizer, sample_texts: Sequence[str]) -> Choice:
    """Compare the fast encoder with the reference, on a sample of the input and on texts that are hard.

    Args:
        tokenizer: encodes by the reference.
        sample_texts: documents of this very input; the first `SAMPLE_CHARS` of them are compared.

    Returns:
        The choice, to be handed to every worker. It is by the reference where any id differs, where
        gigatoken cannot read this tokenizer, or is not installed.
    """
    if tokenizer.is_byte:
        return dict(REFERENCE)
    found_version = version()
    if not found_version:
        return _refuse(f"{PACKAGE} is not installed (pip install {PACKAGE})")
    choice = {"encoder": PACKAGE, "version": found_version}
    try:
        fast = _with(tokenizer, GigatokenEncoder(tokenizer.json_bytes))
    except (ValueError, ImportError) as error:
        return _refuse(f"{PACKAGE} {found_version}: {error}")
    texts = [*_sample(sample_texts), *probes(tokenizer.added_names)]
    text = first_difference(tokenizer.encode_batch, fast.encode_batch, texts)
    if text is not None:
        return _refuse(f"{PACKAGE} {found_version} gives other ids for {excerpt(text)}")
    return choice


def line(choice: Choice) -> str:
    """What to tell the user of a choice: one line, or "" for nothing."""
    why = choice.get("why", "")
    return f"encoding with Hugging Face tokenizers, not the fast encoder: {why}" if why else ""


def can_follow(choice: Choice) -> bool:
    """Whether this machine has the encoder of a choice, in the version that was checked."""
    return choice.get("encoder") == REFERENCE["encoder"] or (
        choice.get("encoder") == PACKAGE and version() == choice.get("version")
    )


def follow(tokenizer: Tokenizer, choice: Choice) -> Tokenizer:
    """Build what a worker encodes with.

    Args:
        tokenizer: as loaded; encodes by the reference.
        choice: by `check`.

    Returns:
        A tokenizer that gives the same ids, by the encoder that was chosen.

    Raises:
        UserError: this machine lacks the very version of the encoder that was checked.
    """
    if choice["encoder"] != PACKAGE:
        return tokenizer
    if not can_follow(choice):
        raise UserError(
            f"{socket.gethostname()}: has {PACKAGE} {version() or 'not at all'}, but this run was planned "
            f"with {choice['version']}; install the same environment on every node, or use "
            "--encoder reference",
            EXIT_CRASH,
        )
    return _with(tokenizer, GigatokenEncoder(tokenizer.json_bytes))


def _with(tokenizer: Tokenizer, encoder: GigatokenEncoder) -> Tokenizer:
    return Tokenizer(tokenizer.json_bytes, name=tokenizer.name, eos=tokenizer.eos, encoder=encoder)


def _refuse(why: str) -> Choice:
    return {"encoder": "reference", "why": why}


def _sample(texts: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    left = SAMPLE_CHARS
    for text in texts:
        chosen.append(text[:left])
        left -= len(chosen[-1])
        if left <= 0:
            break
    return chosen
