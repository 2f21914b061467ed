"""The text of a line of .jsonl.

orjson reads the lines that are short and strict JSON, nearly all. Others are scanned here: a long line
becomes Python's objects of up to 50 times its bytes, of which one field is wanted; and what people's
files have beside JSON (NaN, half a surrogate) is passed over by no library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from typing import AnyStr

import orjson

from hvdlm.corpus.policy import BadRecordError, check_length, valid_utf8, without_surrogates
from hvdlm.text.utf8 import decoded

LONG_LINE_BYTES = 1 << 20
"""From here on a line is scanned whatever it holds."""
_DEPTH = 1024
"""Of nested values that are not empty, at most: what orjson allows."""
_NAMES_SHOWN, _NAME_CHARS = 12, 40

# Source of the grammar: RFC 8259; with NaN and Infinity, as Python's json writes them. Possessive (`*+`):
# what is matched is never given back, and memory does not grow with it. What is repeated is atomic (`(?>`):
# up to Python 3.11.4 a body that fails halfway is not taken back otherwise (cpython issue 106052).
_SPACE = rb"[ \t\n\r]*+"
_PLAIN = rb'[^"\\\x00-\x1f]*+'
_STRING = rb'"' + _PLAIN + rb'(?:(?>\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})' + _PLAIN + rb'))*+"'
_NUMBER = rb"(?>-?(?:0|[1-9][0-9]*+))(?>\.[0-9]++|)(?>[eE][-+]?[0-9]++|)"
_EMPTY = rb"\[" + _SPACE + rb"\]|\{" + _SPACE + rb"\}"
_ATOM = rb"(?:" + _STRING + rb"|true|false|null|NaN|-?Infinity|" + _NUMBER + rb"|" + _EMPTY + rb")"
_COLON = _SPACE + rb":" + _SPACE
_COMMA = _SPACE + rb"," + _SPACE
_SPACES, _VALUE, _KEY = re.compile(_SPACE), re.compile(_ATOM), re.compile(rb"(" + _STRING + rb")" + _COLON)
# Whole runs at once: a step of the loop below costs twenty times as much.
_ITEMS = re.compile(rb"(?:(?>" + _ATOM + _COMMA + rb"))*+")
_MEMBERS = re.compile(rb"(?:(?>" + _STRING + _COLON + _ATOM + _COMMA + rb"))*+")
_ESCAPES = re.compile(
    r"(?:(?>[^\\]++|\\u[dD][89abAB]..(?:\\u[dD][c-fC-F]..|(?=.{6}))|\\u(?![dD][89abAB])....|\\[^u]))*+",
    re.DOTALL,
)
"""Of a part of a string: as far as no escape, and no pair of them, is cut by its end."""
_KINDS = {
    b"{": "an object",
    b"[": "a list",
    b'"': "a string",
    b"t": "true or false",
    b"f": "true or false",
    b"n": "null",
}


def text_of_line(raw: bytes, field: str, invalid: str) -> bytes | None:
    """The text of a line.

    Args:
        raw: the line.
        field: the key that holds the text; of equal keys the last counts.
        invalid: what to do with what is not UTF-8: "error", "replace", "skip".

    Returns:
        Its UTF-8; None = skip the line.

    Raises:
        BadRecordError: not a JSON object that has the text.
    """
    if len(raw) < LONG_LINE_BYTES:
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass
        else:
            if isinstance(record, dict) and isinstance(text := record.get(field), str):
                return text.encode()
    if invalid != "replace" and valid_utf8(raw, invalid) is None:
        return None
    return _scanned(raw, field, invalid)


def _scanned(raw: bytes, field: str, invalid: str) -> bytes | None:
    first = _past(_SPACES, raw, 0)
    if raw[first : first + 1] != b"{":
        _check_end(raw, _end_of_value(raw, first))
        raise BadRecordError(
            f"found {_kind(raw, first)}, needed an object with the field {field!r}; repair the line"
        )
    names: dict[str, None] = {}
    value = None
    longest = 12 * max(len(field), _NAME_CHARS)  # A character is escaped in 12 bytes at most.
    for key, bounds in _members(raw, first + 1):
        if len(key) > longest:
            name = str(key[:_NAME_CHARS], "utf-8", "replace")
        elif (name := json.loads(f'"{str(key, "utf-8", "replace")}"')) == field:
            value = bounds
            continue
        if len(names) < _NAMES_SHOWN:
            names[name.encode(errors="replace").decode()] = None
    if value is None:
        fields = ", ".join(f"{name:.{_NAME_CHARS}}" for name in names) or "none"
        raise BadRecordError(f"no field {field!r}; choose with --field one of: {fields}")
    start, end = value
    if raw[start : start + 1] != b'"':
        raise BadRecordError(
            f"field {field!r} is {_kind(raw, start)}, needed a string; choose another --field"
        )
    return _unescaped(memoryview(raw)[start + 1 : end - 1], invalid)


def _members(raw: bytes, at: int) -> Iterator[tuple[memoryview, tuple[int, int]]]:
    """Each key of the outermost object, escaped, and where its value begins and ends."""
    at = _past(_SPACES, raw, at)
    if raw[at : at + 1] == b"}":
        return _check_end(raw, at + 1)
    while True:
        key = _key(raw, at)
        end = _end_of_value(raw, key.end())
        yield memoryview(raw)[at + 1 : key.end(1) - 1], (key.end(), end)
        at = _past(_SPACES, raw, end)
        if raw[at : at + 1] == b"}":
            return _check_end(raw, at + 1)
        if raw[at : at + 1] != b",":
            raise _not_json(raw, at, "a comma or }")
        at = _past(_SPACES, raw, at + 1)


def _end_of_value(raw: bytes, at: int) -> int:
    """Where the value that begins at a place ends."""
    opened = bytearray()
    while True:
        if atom := _VALUE.match(raw, at):
            at = atom.end()
        elif raw[at : at + 1] in (b"[", b"{"):
            opened += raw[at : at + 1]
            if len(opened) >= _DEPTH:
                raise _not_json(raw, at, f"at most {_DEPTH} nested values")
            at = _next_in(opened, raw, at + 1)
            continue
        else:
            raise _not_json(raw, at, "a value")
        while opened:
            at = _past(_SPACES, raw, at)
            closing = b"]" if opened[-1:] == b"[" else b"}"
            if raw[at : at + 1] == b",":
                at = _next_in(opened, raw, at + 1)
                break
            if raw[at : at + 1] != closing:
                raise _not_json(raw, at, f"a comma or {closing.decode()}")
            opened.pop()
            at += 1
        else:
            return at


def _next_in(opened: bytearray, raw: bytes, at: int) -> int:
    """Where the next value of the innermost list or object begins that is not passed over as one of a run."""
    at = _past(_SPACES, raw, at)
    if opened[-1:] == b"[":
        return _past(_ITEMS, raw, at)
    return _key(raw, _past(_MEMBERS, raw, at)).end()


def _key(raw: bytes, at: int) -> re.Match[bytes]:
    if key := _KEY.match(raw, at):
        return key
    raise _not_json(raw, at, "a key in quotes and a colon")


def _check_end(raw: bytes, at: int) -> None:
    at = _past(_SPACES, raw, at)
    if at < len(raw):
        raise _not_json(raw, at, "the end of the line")


def _past(repeated: re.Pattern[AnyStr], raw: AnyStr, at: int) -> int:
    """Where what may be there any number of times ends."""
    match = repeated.match(raw, at)
    return match.end() if match else at


def _not_json(raw: bytes, at: int, needed: str) -> BadRecordError:
    found = str(raw[at : at + 12].strip(), "utf-8", "replace")
    return BadRecordError(
        f"not JSON (byte {at}: needed {needed}, found {repr(found) if found else 'the end of the line'}); "
        "needed one object a line; repair the line"
    )


def _kind(raw: bytes, at: int) -> str:
    return _KINDS.get(raw[at : at + 1], "a number")  # NaN and Infinity among them.


def _unescaped(value: memoryview, invalid: str) -> bytes | None:
    """What a string in quotes stands for, a part at a time: as a whole it may take four times its bytes."""
    joined, left = BytesIO(), ""
    for part in chain(decoded(value, "replace" if invalid == "replace" else "strict"), [None]):
        left = f"{left}{part or ''}"
        whole = len(left) if part is None else _past(_ESCAPES, left, 0)
        text = json.loads(f'"{left[:whole]}"')
        utf8 = without_surrogates(text, invalid)
        if utf8 is None:
            return None
        joined.write(utf8)
        check_length(joined.tell())
        left = left[whole:]
    return joined.getvalue()
