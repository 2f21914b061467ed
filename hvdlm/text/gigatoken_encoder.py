"""The fast encoder: `gigatoken`, by itself. Whether it may be used is decided in `hvdlm.text.fast`."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any, final

import numpy as np
import psutil

PACKAGE = "gigatoken"
GROWTH_BYTES = 128 << 20
"""Memory that the process may gain before the encoder is made anew: its caches only ever grow."""
_RARE = tuple(bytes([0xF0, second]) for second in range(0xB2, 0xC0)) + tuple(
    bytes([b]) for b in range(0xF1, 0xF5)
)
"""How characters from U+32000 on begin in UTF-8: libraries class what was not assigned differently."""


def version() -> str:
    """The installed version; "" where the package is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


@final
class GigatokenEncoder:
    """Encodes texts in this thread."""

    def __init__(self, json_bytes: bytes, *, growth_bytes: int = GROWTH_BYTES) -> None:
        """Args:
            json_bytes: a `tokenizer.json`.
            growth_bytes: see `GROWTH_BYTES`.

        Raises:
            ValueError: it cannot be read by gigatoken; the message is the library's.
            ImportError: the package is not installed.
        """
        spec = json.loads(json_bytes)
        # It would find them in text; the reference never does.
        added = spec.get("added_tokens") or []
        spec["added_tokens"] = [token for token in added if not token.get("special")]
        self._json = json.dumps(spec)
        self._growth_bytes = growth_bytes
        self._process = psutil.Process()
        self._open()

    def encode(self, text: str) -> np.ndarray | None:
        """Encode one text.

        Args:
            text: without lone surrogates.

        Returns:
            uint32 [tokens]; None for a text whose ids are only known to the reference.
        """
        raw = text.encode()
        if not text.isascii() and any(start in raw for start in _RARE):
            return None
        ids: np.ndarray = self._backend.encode(raw)
        return ids

    def bound_memory(self) -> bool:
        """Drop the caches when the process has grown by more than is allowed. Ids do not depend on them.

        Returns:
            Whether it had.
        """
        grown = self._process.memory_info().rss - self._base_bytes > self._growth_bytes
        if grown:
            self._open()
        return grown

    def _open(self) -> None:
        self._backend: Any = None
        self._backend = _load(self._json)
        self._base_bytes: int = self._process.memory_info().rss


def _load(spec: str) -> Any:
    from gigatoken.gigatoken_rs import load_hf_json

    try:
        return load_hf_json(spec)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library's Rust code is not an Exception
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:120]) from None
