import contextlib
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hvdlm.config import UserError
from hvdlm.corpus import lines, parquet, plan, policy
from hvdlm.corpus.documents import Rejects
from hvdlm.corpus.plan import Piece, make_plan
from hvdlm.corpus.readers import ReadOptions, read_documents
from hvdlm.corpus.sources import describe

NASTY = [
    "",
    "a\x00b",
    "line\r\nline\rx\n",
    "中文字",
    "👩‍👩‍👧 e\u0301",
    "\u2028 \x85 \x1c",
    " \n \n",
    "x" * 1_000_000,
]


def read(path: Path, document: str = "file", invalid: str = "error", field: str = "text") -> list[str | None]:
    tasks = make_plan([describe(path)], [], document=document, field=field, seed=0)
    options, rejects = ReadOptions(field, document, invalid), Rejects(0)
    documents = []
    for task in tasks:
        for piece in task.pieces:
            for found in read_documents(piece, options, path.parent):
                if found.problem:
                    rejects.add(piece, found, "bad", detail=found.problem)
                documents.append(found)
    assert documents[-1].done_bytes <= tasks[-1].size_bytes
    return [None if document.text is None else document.text.decode() for document in documents]


def failure(path: Path, **options: Any) -> str:
    """What the first bad record, or the file, is refused with."""
    with pytest.raises(UserError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("text", NASTY[1:], ids=lambda text: ascii(text[:9]))
def test_a_text_file_is_one_exact_document(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text]


def test_every_container_gives_the_same_documents(tmp_path: Path) -> None:
    raw = jsonl(NASTY)
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "crlf.jsonl").write_bytes(raw.replace(b"\n", b"\r\n").rstrip())
    (tmp_path / "blank.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\n\n  \n"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:99]) + gzip.compress(raw[99:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw[:99]) + zstandard.compress(raw[99:]))
    pq.write_table(pa.table({"text": NASTY, "n": [0] * len(NASTY)}), tmp_path / "a.parquet", row_group_size=3)
    dictionary = pa.array(NASTY).dictionary_encode()
    pq.write_table(pa.table({"text": dictionary}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": pa.array(NASTY, pa.large_string())}), tmp_path / "l.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == NASTY, path


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo \n\n \t\nthree\x0c\x85four\r\n\r\n\n五\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_bytes(jsonl([text.removeprefix("\ufeff"), "six"]))
    paragraphs = ["one\r\ntwo ", "three\x0c\x85four", "五"]
    lines = ["one", "two ", "", " \t", "three\x0c\x85four", "", "", "五"]
    assert read(tmp_path / "a.txt", "paragraph") == paragraphs
    assert read(tmp_path / "a.txt", "line") == lines
    assert read(tmp_path / "a.jsonl", "paragraph") == [*paragraphs, "six"]
    assert [line for line in read(tmp_path / "a.jsonl", "line") if line] == [*filter(None, lines), "six"]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_chunks_do_not_show(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffab\r\n\n中\n\nlast".encode())
    assert read(path, "paragraph") == ["ab", "中", "last"]


def test_what_is_too_long_for_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, lines, policy):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 16)
    path = tmp_path / "a.txt"
    path.write_text("12345678\n\n1234567\n1234567\n")
    with pytest.raises(UserError, match=r"a\.txt: one document of 26 bytes, at most 16 can be; cut it with"):
        make_plan([describe(path)], [], document="file", field="text", seed=0)
    assert read(path, "line") == ["12345678", "", "1234567", "1234567"]
    assert read(path, "paragraph") == ["12345678", "1234567\n1234567"]
    path.write_text("12345678\n\n1234567\n12345678\n")
    assert failure(path, document="paragraph").startswith("line 3: a document of more than 16 bytes begins")
    path.write_text("1\n" + 17 * "x" + "\n")
    assert failure(path, document="line").startswith("line 2: a document of more than 16 bytes begins here")
    pq.write_table(pa.table({"text": ["x" * 17]}), tmp_path / "a.parquet")
    assert failure(tmp_path / "a.parquet").startswith("row 1: 17 bytes, at most 16 can be")


def test_a_parquet_file_whose_footer_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(25)]}), path)
    raw = path.read_bytes()
    # 25 and 26 as the footer's counts: a field of 64 bits in Thrift's compact protocol, zigzag.
    at = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    told, more = b"\x16\x32", b"\x16\x34"
    assert raw[at:].count(told) == 3
    path.write_bytes(raw[:at] + raw[at:].replace(told, more))
    assert failure(path).startswith("not a usable Parquet file (row group 0 has 25 of 26 rows)")
    path.write_bytes(raw[:at] + raw[at:].replace(told, more, 1))
    assert failure(path).startswith("not a usable Parquet file (26 rows, its row groups have 25)")
    path.write_bytes(raw[:at] + raw[at:].replace(b"text", b"tex\xf4"))
    assert failure(path).startswith("not a usable Parquet file (")


def test_a_million_newlines_are_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * (1 << 20)))
    found = lines.read_lines(Piece(str(path), "jsonl.zst", 0, path.stat().st_size, 1))
    text = b"\n" * (1 << 20)
    tracemalloc.start()
    try:
        assert next(found).raw == b"\n"
        assert next(lines.parts_of_text(text, "line", Piece("", "jsonl", 0, 1, 1))) == b""
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_rows_and_chunks_in_memory_are_bounded_in_bytes(tmp_path: Path) -> None:
    assert 1 <= parquet._rows_at_once(8, 8 << 21) <= 4
    assert parquet._rows_at_once(8, 8) == 256
    blank = tmp_path / "a.jsonl.zst"
    blank.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * (256 << 20)))
    with blank.open("rb") as source:
        chunks = lines._unzstd(source, Piece(str(blank), "jsonl.zst", 0, 1, 1))
        sizes = [len(chunk) for chunk in chunks]
    assert sum(sizes) == 256 << 20
    assert max(sizes) <= 64 << 20


def test_a_piece_with_a_byte_order_mark_alone_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "a.txt") == [""]
    piece = Piece(str(tmp_path / "a.txt"), "text", 0, 3, 3)
    assert [d.text for d in read_documents(piece, ReadOptions(document="paragraph"), tmp_path)] == []


def test_invalid_utf8_by_policy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\nlast\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "last"}\n')
    column = pa.array([b"good", b"b\xffd", b"last"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, column.buffers())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    for name, place in [("a.txt", "line 2"), ("a.jsonl", "line 2"), ("a.parquet", "row 2")]:
        document = "line" if name == "a.txt" else "file"
        message = failure(tmp_path / name, document=document)
        assert message.startswith(f"{place}: not UTF-8 text (byte 0xff at offset")
        assert "--invalid replace or skip" in message
        assert read(tmp_path / name, document, "replace") == ["good", "b\ufffdd", "last"]
        assert read(tmp_path / name, document, "skip") == ["good", None, "last"]
    assert failure(tmp_path / "a.txt").startswith("not UTF-8 text (byte 0xff at offset 6)")


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"\x7fELF\xf0\xff", "a program"),
        ("héllo".encode("utf-16"), "UTF-16 text"),
        (gzip.compress(b"a", mtime=0), "a gzip file"),
    ],
)
def test_a_binary_file_is_called_what_it_is(raw: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    assert f"it looks like {name}" in failure(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "not JSON (byte 13: needed a comma or }, found the end of the line)"),
        ('{"text": "x}', "not JSON (byte 9: needed a value, found '\"x}')"),
        ('{"text": "x",}', "not JSON (byte 13: needed a key in quotes and a colon, found '}')"),
        ('{"text": [1,,2]}', "not JSON (byte 12: needed a value, found ',2]}')"),
        ('{"text": "x"} {}', "not JSON (byte 14: needed the end of the line, found '{}')"),
        ("[1 2]", "not JSON (byte 3: needed a comma or ], found '2]')"),
        ('{"body": "x", "id": 3}', "no field 'text'; choose with --field one of: body, id"),
        ("{}", "no field 'text'; choose with --field one of: none"),
        ('{"text": 3}', "field 'text' is a number, needed a string"),
        ('{"text": null}', "field 'text' is null, needed a string"),
        ('{"text": ["x"]}', "field 'text' is a list, needed a string"),
        ('["x"]', "found a list, needed an object with the field 'text'"),
        ('"x"', "found a string, needed an object"),
        ("[" * 100_000, "not JSON (byte 1023: needed at most 1024 nested values, found '[[[[[[[[[[[[')"),
        ('{"text": "a\\udc00b"}', "an escape \\ud800 to \\udfff without its other half"),
    ],
    ids=lambda value: value[:16],
)
def test_a_bad_line_is_named_with_the_cure(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert failure(tmp_path / "a.jsonl").startswith(f"line 3: {message}")


def test_half_an_escaped_character_by_policy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert read(tmp_path / "a.jsonl", invalid="replace") == ["a\ufffd b 😀"]
    assert read(tmp_path / "a.jsonl", invalid="skip") == [None]


def test_json_that_only_python_reads_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"score": NaN, "text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_line_numbers_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": "y" * 1000})] * 5000
    rows[4321] = "{"
    path.write_text("\n".join(rows))
    assert len(make_plan([describe(path)], [], document="file", field="text", seed=0)) > 3
    assert failure(path).startswith("line 4322: not JSON")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_and_damaged_archives(kind: str, kept: float, tmp_path: Path) -> None:
    raw = b"".join(jsonl([f"text {i * i}"]) for i in range(2000))
    data = (
        gzip.compress(raw, mtime=0)
        if kind == "gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    )
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(data[: int(len(data) * kept)])
    assert "truncated: it ends too early" in failure(path)
    flipped = bytearray(data)
    flipped[int(len(data) * kept) - 1] ^= 0x10
    path.write_bytes(flipped)
    assert failure(path)
    for place in range(10 if kind == "gz" else 6, len(data) // 2, 97):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with contextlib.suppress(UserError):
            read(path)
    path.write_bytes(raw)
    assert "copy or download the file again" in failure(path)


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1], "note": ["y"]}), path)
    assert failure(path) == "no column 'text'; choose with --field one of: body, id, note"
    assert (
        failure(path, field="id")
        == "column 'id' holds int64, needed strings; choose with --field one of: body, note"
    )
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["text", "text"]), path)
    assert failure(path) == "2 columns 'text', needed one; rename the others"
    path.write_bytes(path.read_bytes()[:-20])
    assert failure(path).startswith("not a usable Parquet file (")
    path.write_bytes(b"no parquet")
    assert failure(path).startswith("not a usable Parquet file (")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert failure(path).startswith("row 2: column 'text' is null")


def test_a_file_that_vanishes_or_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for document in ("file", "line"):
        with pytest.raises(UserError, match="cannot be read: No such file"):
            list(read_documents(Piece(str(path), "text", 0, 9, 9), ReadOptions(document=document), tmp_path))
    path.write_text("short")
    with pytest.raises(UserError, match="became shorter"):
        list(read_documents(Piece(str(path), "text", 0, 9, 9), ReadOptions(document="line"), tmp_path))
