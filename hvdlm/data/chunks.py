"""Token files of other programs as a stream of chunks: their documents cut, ended and checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from hvdlm.config import UserError
from hvdlm.data.entries import TokenizerInfo

CHUNK_TOKENS = 1 << 20
"""Readers give at most so many tokens at a time."""
HASHED_TOKENS = 1 << 20
"""The split of a document follows from its first tokens, so that a long one need not be held in memory."""


class Chunk(NamedTuple):
    """Tokens as they follow each other in a file; the first and the last document may go on beyond them.

    Attributes:
        tokens: integers [t], at least 1.
        ends: int64 [n], rising, in 1..t: a document ends before the token of that index.
    """

    tokens: np.ndarray
    ends: np.ndarray


def in_vocabulary(chunks: Iterable[Chunk], tokenizer: TokenizerInfo, *, where: str) -> Iterator[Chunk]:
    """Check that the tokenizer has every id, and convert them to the type that shards store.

    Args:
        chunks: From the beginning of a file.
        tokenizer: What made the ids.
        where: Names the file in the message.

    Raises:
        UserError: It does not have one.
    """
    first = 0
    for tokens, ends in chunks:
        outside = (tokens < 0) | (tokens >= tokenizer.vocab_size)
        if outside.any():
            place = int(outside.argmax())
            raise UserError(
                f"{where}: token {first + place} is {tokens[place]}, the tokenizer has ids 0 to "
                f"{tokenizer.vocab_size - 1}; give the --tokenizer that made the ids, and check the format"
            )
        first += len(tokens)
        yield Chunk(tokens.astype(tokenizer.token_dtype), ends)


def with_eos(chunks: Iterable[Chunk], eos_id: int) -> Iterator[Chunk]:
    """Append eos to every document that does not end with it."""
    for tokens, ends in chunks:
        lacking = tokens[ends - 1] != eos_id
        if lacking.any():
            complete = np.insert(tokens, ends[lacking], eos_id)
            yield Chunk(complete, ends + np.cumsum(lacking))
        else:
            yield Chunk(tokens, ends)


def by_split(chunks: Iterable[Chunk], val_fraction: float) -> Iterator[tuple[str, Chunk]]:
    """Send every document to training or validation by its own hash, so equal ones stay together.

    The hash is XXH3-64 of the first `HASHED_TOKENS` ids, the final eos left out, as `<u4`.

    Args:
        chunks: Of whole documents, each ending with eos.
        val_fraction: Share that goes to validation, 0..1.

    Yields:
        "train" or "val", and documents of that split, in their order.
    """
    waiting, going_on = np.zeros(0, np.uint32), None
    for chunk in chunks:
        tokens = np.concatenate([waiting, chunk.tokens.astype("<u4")])
        ends = chunk.ends + len(waiting)
        closed = int(ends[-1]) if len(ends) else 0
        undecided = len(ends) > 0 or going_on is None
        waiting = tokens[len(tokens) :]
        if undecided and len(tokens) - closed < HASHED_TOKENS:
            tokens, waiting = tokens[:closed], tokens[closed:].copy()
        if not len(tokens):
            continue
        is_val = _is_val(tokens, ends, val_fraction)
        if going_on is not None:
            is_val[0] = going_on
        going_on = bool(is_val[-1]) if len(tokens) > closed else None
        yield from _parted(Chunk(tokens, ends), is_val)


def _is_val(tokens: np.ndarray, ends: np.ndarray, val_fraction: float) -> np.ndarray:
    """bool [documents that end, and the one that goes on if there is one]."""
    raw = tokens.data.cast("B")
    limit, flags, start = val_fraction * 2.0**64, [], 0
    for end in ends.tolist():
        stop = min(end - 1, start + HASHED_TOKENS)
        flags.append(xxhash.xxh3_64_intdigest(raw[4 * start : 4 * stop]) < limit)
        start = end
    if start < len(tokens):
        flags.append(xxhash.xxh3_64_intdigest(raw[4 * start : 4 * (start + HASHED_TOKENS)]) < limit)
    return np.array(flags, dtype=bool)


def _parted(chunk: Chunk, is_val: np.ndarray) -> Iterator[tuple[str, Chunk]]:
    """The documents of each split that has any."""
    bounds = np.concatenate([np.zeros(1, np.int64), chunk.ends])
    if len(is_val) > len(chunk.ends):
        bounds = np.append(bounds, len(chunk.tokens))
    lengths = np.diff(bounds)
    of_token = np.repeat(is_val, lengths)
    for split, flag in (("train", False), ("val", True)):
        chosen = is_val == flag
        if chosen.all():
            yield split, chunk
        elif chosen.any():
            ended = int(chosen[: len(chunk.ends)].sum())
            yield split, Chunk(chunk.tokens[of_token == flag], np.cumsum(lengths[chosen])[:ended])
