"""Lines that are scanned, against Python's own json."""

import json
import random
import re
from pathlib import Path

import pytest

from hvdlm.corpus import json_lines
from hvdlm.corpus.json_lines import text_of_line
from hvdlm.corpus.policy import BadRecordError, valid_utf8
from hvdlm.text import utf8

POLICIES = ["error", "replace", "skip"]
CHARS = [
    "a",
    "text",
    "中",
    "👩",
    " ",
    "\\n",
    '\\"',
    "\\\\",
    "\\/",
    "\\u4e2d",
    "\\ud83d\\ude00",
    "\\ud83d",
    "\\udc00",
]
ATOMS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "false",
    "null",
    "0",
    "-1",
    "1.50",
    "1E5",
    "2e+3",
    "[ ]",
    "{}",
]
NO_ATOMS = ["01", "-", "1.", ".5", "+1", "1e", "nan", "tru", "+Infinity", "'a'"]
NOISE = b'[]{},:"\\0-.eN\xff\xe4\x80 \n\x01t'


def expected(raw: bytes, invalid: str) -> bytes | str | None:
    """The text by Python's json, or "bad"."""
    try:
        line = raw.decode("utf-8", "replace" if invalid == "replace" else "strict")
    except UnicodeDecodeError:
        return "bad" if invalid == "error" else None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "bad"
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return "bad"
    try:
        return text.encode()
    except UnicodeEncodeError:
        half = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
        return {"error": "bad", "skip": None, "replace": half}[invalid]


def found(raw: bytes, invalid: str) -> bytes | str | None:
    try:
        return text_of_line(raw, "text", invalid)
    except BadRecordError:
        return "bad"


def some_line(rng: random.Random) -> bytes:
    def string() -> str:
        return f'"{"".join(rng.choices(CHARS, k=rng.randrange(5)))}"'

    def value(depth: int = 0) -> str:
        kind = rng.randrange(5 if depth < 4 else 3)
        items = [value(depth + 1) for _ in range(rng.randrange(4))] if kind > 2 else []
        if kind == 0:
            return rng.choice(ATOMS if rng.random() < 0.9 else NO_ATOMS)
        if kind < 3:
            return string()
        if kind == 3:
            return f"[{' , '.join(items)} ]"
        return "{" + ",".join(f"{string()} :{item}" for item in items) + "}"

    keys = rng.choices(['"text"', '"te\\u0078t"', '"n"', string()], k=rng.randrange(1, 5))
    line = bytearray(("{" + ",".join(f"{key}: {value()}" for key in keys) + "}").encode())
    for _ in range(rng.choice([0, 0, 1, 2])):
        line.insert(rng.randrange(len(line) + 1), rng.choice(NOISE))
        del line[rng.randrange(len(line))]
    return bytes(line)


@pytest.mark.parametrize("part_bytes", [1 << 20, 5])
@pytest.mark.parametrize("long_line_bytes", [1 << 20, 0])
def test_lines_mean_what_json_says(
    long_line_bytes: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", long_line_bytes)
    monkeypatch.setattr(utf8, "PART_BYTES", part_bytes)
    rng, good = random.Random(part_bytes), 0
    for _ in range(10_000):
        raw, invalid = some_line(rng), rng.choice(POLICIES)
        assert found(raw, invalid) == expected(raw, invalid), (raw, invalid)
        good += isinstance(expected(raw, invalid), bytes)
    assert good > 1000


@pytest.mark.parametrize("invalid", POLICIES)
@pytest.mark.parametrize(
    "line",
    [
        '{"text": "plain \\n \\u4e2d \\ud83e\\udd80 中"}',
        ' { "n" : [1, {"text": [2]}], "text" :  "after" , "more": null} ',
        '{"text": "first", "text": "last"}',
        '{"body": "x"}',
        '{"a\\tb": "y", "\\ud800": 1}',
        '{"n": NaN, "text": "tolerant"}',
        '{"text": "half \\ud800"}',
        '{"n": "half \\ud800", "text": "x"}',
        '{"text": ["a"]}',
        '{"text": {"a": 1}}',
        '{"text": 1e5}',
        '{"text": -1}',
        '{"text": NaN}',
        '{"text": true}',
        '{"text": null}',
        '{"text": "cut',
        '{"text": "x", "n": [1,,2]}',
        '{"text": "x", "n": 01}',
        '{"text": "x", "n": 1.}',
        '{"text": "x", "n": -}',
        '{"text": "x", "n": "\\q"}',
        '{"text": "x", "n": "\x01"}',
        '{"text": "x"} {}',
        '["text"]',
        '"text"',
        f'{{"n": {"[" * 3000}{"]" * 3000}, "text": "deep"}}',
        f'{{"n": {"[" * 500}{"]" * 500}, "text": "deep enough"}}',
    ],
    ids=lambda value: value[:24],
)
def test_a_long_line_is_read_as_any_other(line: str, invalid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results, problems = list[bytes | str | None](), set[str]()
    for long_line_bytes in (0, 1 << 20):
        monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", long_line_bytes)
        try:
            results.append(text_of_line(line.encode(), "text", invalid))
        except BadRecordError as error:
            results.append("bad")
            problems.add(str(error))
    assert results == [expected(line.encode(), invalid)] * 2
    assert len(problems) == ("bad" in results)


@pytest.mark.parametrize("name", ["_VALUE", "_KEY", "_ITEMS", "_MEMBERS", "_ESCAPES"])
def test_what_is_repeated_is_atomic(name: str) -> None:
    """Up to Python 3.11.4 a possessive repeat of any other group does not mean what it should."""
    pattern = getattr(json_lines, name).pattern
    text = pattern if isinstance(pattern, str) else pattern.decode()
    assert re.search(r"\)[*+?]\+", text)
    assert not re.search(r"(?<!\))\)[*+?]\+", text)
    assert text.count("(?:(?>") == len(re.findall(r"\)[*+?]\+", text))


@pytest.mark.parametrize("part_bytes", range(4, 30))
def test_no_escape_is_cut(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 0)
    monkeypatch.setattr(utf8, "PART_BYTES", part_bytes)
    text = 'a\\\\\\"b\n中\t\\n👩\u200d👩 e\u0301' * 7
    for ascii_only in (True, False):
        line = json.dumps({"text": text}, ensure_ascii=ascii_only).encode()
        assert found(line, "error") == text.encode()
    halves = '{"text": "' + "\\ud83d\\ud83d\\ude00\\ude00" * 7 + '"}'
    assert found(halves.encode(), "replace") == ("\ufffd😀\ufffd" * 7).encode()


def test_names_of_fields_are_shown_but_not_all(tmp_path: Path) -> None:
    keys = [*(f"k{i}" for i in range(20)), "z" * 100_000]
    with pytest.raises(BadRecordError, match=re.escape("one of: k0, k1, k2, ")) as caught:
        text_of_line(json.dumps(dict.fromkeys(keys)).encode(), "text", "error")
    assert len(str(caught.value)) < 150
    with pytest.raises(BadRecordError, match="no field '\ufffd'; choose with --field one of: \\?, x"):
        text_of_line(b'{"\\ud800":"a","x":NaN}', "\ufffd", "replace")
    assert text_of_line(json.dumps({"z" * 100_000: "x"}).encode(), "z" * 100_000, "error") == b"x"


def test_what_replaces_bytes_counts_into_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.corpus.policy.MAX_DOCUMENT_BYTES", 8)
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 0)
    assert text_of_line(b'{"text": "\xff\xff"}', "text", "replace") == "\ufffd\ufffd".encode()
    with pytest.raises(BadRecordError, match="9 bytes, at most 8 can be"):
        text_of_line(b'{"text": "\xff\xff\xff"}', "text", "replace")
    with pytest.raises(BadRecordError, match="9 bytes, at most 8 can be"):
        valid_utf8(b"\xff\xff\xff", "replace")
