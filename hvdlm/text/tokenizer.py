"""One interface to every tokenizer: a `tokenizer.json` of Hugging Face `tokenizers`.

Text is only ever text here: where a document spells a special token (`<|endoftext|>`), the
characters are encoded, never the special id. So `eos` in a shard always is the end of a document.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers

from hvdlm.config import UserError
from hvdlm.text import byte
from hvdlm.text.gigatoken_encoder import GigatokenEncoder
from hvdlm.text.pieces import PIECE_CHARS, cut, cut_inside

KNOWN_EOS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<EOS>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Names of the token that ends a document; the first that a tokenizer has is taken."""


@final
class Tokenizer:
    """Encodes texts to integer ids and back.

    Attributes:
        json_bytes: the `tokenizer.json`, verbatim.
        name: what error messages call it.
        eos: the name that was given for the token that ends a document, or "".
        is_byte: whether ids are the UTF-8 bytes; then neither library is needed to encode.
        added_names: the tokens that were added to the model's own.
        fingerprint: sha256 of `json_bytes`, in hexadecimal.
        vocab_size: the largest id, added tokens included, plus 1.
        dtype: uint16 if and only if every id fits, else uint32.
    """

    def __init__(
        self,
        json_bytes: bytes,
        *,
        name: str = "tokenizer.json",
        eos: str = "",
        encoder: GigatokenEncoder | None = None,
    ) -> None:
        """Args:
            json_bytes: the content of a `tokenizer.json`.
            name: what error messages call it.
            eos: the token that ends a document; "" = the first of `KNOWN_EOS` that it has.
            encoder: encodes in place of the library; see `hvdlm.text.fast`.

        Raises:
            UserError: not a `tokenizer.json`, no token in it, or an `eos` that it does not have.
        """
        self.json_bytes = json_bytes
        self.fingerprint = hashlib.sha256(json_bytes).hexdigest()
        self.name = name
        self.eos = eos
        self._library = _parse(json_bytes, name)
        vocab = self._library.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{name}: a tokenizer without a single token; choose another --tokenizer")
        self.vocab_size = max(vocab.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        spec = json.loads(json_bytes)
        self.is_byte = byte.is_byte(spec)
        added = spec.get("added_tokens") or []
        self.added_names = [token["content"] for token in added]
        self._specials = [token["content"] for token in added if token.get("special")]
        self._eos = self._find_eos(eos, vocab)
        self._guarded, self._guard = self._make_guard(spec, vocab)
        self._encoder = encoder

    @property
    def eos_id(self) -> int:
        """The id that ends a document.

        Raises:
            UserError: no known name is in the vocabulary and none was given.
        """
        if self._eos is None:
            found = ", ".join(self._specials[:12]) or "none"
            raise UserError(
                f"{self.name}: no end-of-document token of a usual name ({' '.join(KNOWN_EOS)}); "
                f"name one with --eos; its special tokens: {found}"
            )
        return self._eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts, without eos and without anything a template of the tokenizer would add.

        Args:
            texts: without lone surrogates, of any length (long ones are cut, see `text.pieces`).

        Returns:
            One array of `dtype` [tokens] a text, not to be written to.
        """
        if self.is_byte:
            return [byte.encode(text) for text in texts]
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(texts):
            encoded = self._encode_pieces([piece for _, piece in group])
            for (index, piece), ids in zip(group, encoded, strict=True):
                parts[index].append(self._encode_plainly(piece) if self._guard[ids].any() else ids)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; special tokens appear by name, broken UTF-8 as U+FFFD.

        Args:
            ids: ids below `vocab_size`; others are left out.
        """
        return self._library.decode([int(id) for id in ids], skip_special_tokens=False)

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        """Encode texts that are not too long, as they are."""
        if self._encoder is None:
            return self._encode_by_library(pieces)
        fast = [self._encoder.encode(piece) for piece in pieces]
        self._encoder.bound_memory()
        return [
            self._encode_by_library([piece])[0] if ids is None else ids.astype(self.dtype, copy=False)
            for piece, ids in zip(pieces, fast, strict=True)
        ]

    def _encode_by_library(self, pieces: list[str]) -> list[np.ndarray]:
        try:
            encoded = self._library.encode_batch_fast(pieces, add_special_tokens=False)
        except Exception as error:  # What the library raises is of no narrower type.
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{self.name}: cannot encode a text: {reason}; needed a tokenizer that encodes any text, "
                "by an unknown token or by bytes"
            ) from None
        return [_array(result.ids, self.dtype) for result in encoded]

    def _find_eos(self, eos: str, vocab: dict[str, int]) -> int | None:
        if eos and eos not in vocab:
            raise UserError(
                f"--eos {eos}: {self.name} has no such token; its special tokens: "
                f"{', '.join(self._specials[:12]) or 'none'}"
            )
        names = (eos,) if eos else KNOWN_EOS
        return next((vocab[name] for name in names if name in vocab), None)

    def _make_guard(self, spec: dict[str, Any], vocab: dict[str, int]) -> tuple[re.Pattern[str], np.ndarray]:
        """Which ids text must not produce: special ones and eos, except the unknown token."""
        model = spec.get("model") or {}
        unknown = model.get("unk_token")
        if model.get("type") == "Unigram" and model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        by_id = {id: text for text, id in vocab.items()}
        names = {*self._specials, *([by_id[self._eos]] if self._eos is not None else [])}
        names = {name for name in names if name in vocab and len(name) > 1 and name != unknown}
        guard = np.zeros(self.vocab_size, dtype=bool)
        guard[[vocab[name] for name in names]] = True
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"), guard

    def _encode_plainly(self, text: str) -> np.ndarray:
        """Encode a text that spells a special token the model itself has in its vocabulary.

        `encode_special_tokens` is not enough there: a Unigram or word model finds the token again by
        itself, and eos may be an ordinary added token. Cutting inside the name prevents both.
        """
        pieces = cut_inside(text, self._guarded)
        ids = np.concatenate([part for piece in pieces for part in self._encode_cutting(piece)])
        if self._eos is not None and (ids == self._eos).any():
            raise UserError(
                f"{self.name}: encodes ordinary text as its end-of-document token {self._eos}; "
                "name another with --eos"
            )
        return ids

    def _encode_cutting(self, text: str) -> list[np.ndarray]:
        """Encode a text, cut inside what became a special token only after the tokenizer normalized it."""
        found = self._library.encode(text, add_special_tokens=False)
        ids = _array(found.ids, self.dtype)
        spans = [found.offsets[place] for place in np.flatnonzero(self._guard[ids])]
        cuts = [first + 1 for first, end in spans if end - first > 1]
        if not cuts:
            return [ids]
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        return [part for piece in pieces for part in self._encode_cutting(piece)]


def load(path: Path, *, eos: str = "") -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: the file, or a folder that holds a `tokenizer.json`.
        eos: the token that ends a document; "" = by its usual names.

    Raises:
        UserError: not there, not readable, not a `tokenizer.json`, or without that `eos`.
    """
    file = path
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: cannot read this tokenizer: {error.strerror}; give the path of a tokenizer.json"
        ) from None
    return Tokenizer(content, name=str(file), eos=eos)


def from_library(library: tokenizers.Tokenizer, *, name: str = "tokenizer.json", eos: str = "") -> Tokenizer:
    """Take over a tokenizer that was just built (see `Tokenizer`)."""
    return Tokenizer(library.to_str().encode(), name=name, eos=eos)


def _parse(json_bytes: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_buffer(json_bytes)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library's Rust code is not an Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: not a tokenizer.json of Hugging Face tokenizers ({reason}); save one with "
            "Tokenizer.save() or save_pretrained()"
        ) from None
    # A file may carry the truncation and padding of the model it was used with.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library


def _array(ids: list[int], dtype: np.dtype) -> np.ndarray:
    """Ids as an array: half the time of numpy's own conversion, which looks at each one's type."""
    return np.frombuffer(struct.pack(f"{len(ids)}{dtype.char}", *ids), dtype)


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Pieces of texts with the text's index, so many at a time that memory stays bounded."""
    group: list[tuple[int, str]] = []
    chars = 0
    for index, text in enumerate(texts):
        for piece in cut(text):
            if group and chars + len(piece) > PIECE_CHARS:
                yield group
                group, chars = [], 0
            group.append((index, piece))
            chars += len(piece)
    if group:
        yield group
