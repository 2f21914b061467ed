"""Huge pages of Parquet, which do not go through pyarrow. Its own reader says what is in them."""

import random
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdlm.config import UserError
from hvdlm.corpus import parquet, parquet_headers
from hvdlm.corpus.parquet_pages import TooLong

CODECS = ["none", "snappy", "gzip", "brotli", "zstd"]
SOME = ["", "a", None, "中文\0", "👩" * 20, "x" * 3000, "a", None, "end"] * 30


@pytest.fixture(params=[0, 200])
def huge_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From how many bytes a page is huge here: all of them, or some of a column's."""
    set_huge(monkeypatch, request.param)
    return request.param


def set_huge(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(parquet_headers, "HUGE_BYTES", size)
    monkeypatch.setattr(parquet, "HUGE_BYTES", size)
    monkeypatch.setattr(parquet, "UNUSUAL_BYTES", 2 * size)


def read_all(
    path: Path, groups: range = range(1), *, scratch: Path | None = None, longest_bytes: int = 1 << 30
) -> Iterator[parquet.Row]:
    return parquet.read_rows(
        str(path), "text", groups, longest_bytes=longest_bytes, scratch=scratch or path.parent
    )


def rows_of(path: Path, first: int = 0) -> list[tuple[int, str | None]]:
    """What is read from a row group on, and that the rest of the file's folder is as before."""
    groups = range(first, pq.ParquetFile(path).num_row_groups)
    before = sorted(path.parent.iterdir())
    rows = [
        (row.number, None if row.cell is None else bytes(row.cell).decode()) for row in read_all(path, groups)
    ]
    assert sorted(path.parent.iterdir()) == before
    return rows


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_all(path))
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_huge_pages_are_read_as_pyarrow_reads_them(
    codec: str, version: str, huge_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    for dictionary, page_bytes, dictionary_bytes in product([False, True], [50, 1 << 20], [50, 1 << 20]):
        table = pa.table({"n": range(len(SOME)), "text": pa.array(SOME, pa.large_string())})
        pq.write_table(
            table,
            path,
            row_group_size=97,
            compression=codec,
            data_page_version=version,
            use_dictionary=dictionary,
            data_page_size=page_bytes,
            dictionary_pagesize_limit=dictionary_bytes,
            write_batch_size=10,
            write_page_checksum=dictionary,
        )
        assert rows_of(path) == [*enumerate(SOME, 1)]
        assert rows_of(path, first=2) == [*enumerate(SOME, 1)][2 * 97 :]


@pytest.mark.parametrize(
    "texts",
    [["one"] * 1000, [None] * 1000, [""] * 1000, ["a", None] * 500, [], ["long " * 9999]],
    ids=range(6),
)
def test_columns_of_one_kind_of_text(texts: list[str | None], huge_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kinds = [pa.string(), pa.dictionary(pa.int32(), pa.string())]
    for kind, version, nullable in product(kinds, ["1.0", "2.0"], {None in texts, True}):
        column = pa.array(texts, pa.string()).cast(kind)
        table = pa.table([column], pa.schema([pa.field("text", kind, nullable=nullable)]))
        pq.write_table(table, path, data_page_version=version)
        assert rows_of(path) == [*enumerate(texts, 1)]


def test_a_flipped_bit_gives_texts_or_one_line(huge_bytes: int, tmp_path: Path) -> None:
    source, path, told = random.Random(0), tmp_path / "a.parquet", set()
    for codec, version, checked in product(["none", "snappy", "zstd"], ["1.0", "2.0"], [False, True]):
        table = pa.table({"text": SOME})
        options: dict[str, Any] = {"compression": codec, "data_page_version": version}
        pq.write_table(table, path, write_page_checksum=checked, **options)
        raw = path.read_bytes()
        footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
        for _ in range(60):
            at = source.randrange(4, footer)
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << source.randrange(8)]) + raw[at + 1 :])
            try:
                rows = read_all(path)
                assert len([*rows]) == len(SOME)
            except UserError as error:
                message = str(error)
                assert "\n" not in message
                assert message.endswith("copy or make it again") or "; write the file again with" in message
                told.add(message.split("(")[1][:20])
    assert len(told) > 5


def test_a_checksum_of_the_writer_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 9}), path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"some text", b"same text", 1))
    assert "checksum verification failed" in refusal(path)
    set_huge(monkeypatch, 0)
    assert refusal(path) == (
        "not a usable Parquet file (a page differs from its checksum); copy or make it again"
    )


def test_huge_pages_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, huge = tmp_path / "a.parquet", 1 << 20
    set_huge(monkeypatch, huge)
    monkeypatch.setattr(parquet_headers, "MAX_HELD_BYTES", 3 << 20)
    monkeypatch.setattr(parquet_headers, "_WINDOW_BYTES", 0)
    noise = random.Random(0).randbytes(2 << 20).hex()
    rows = [noise[i : i + (1 << 18)] for i in range(0, len(noise), 1 << 18)]
    pq.write_table(pa.table({"text": rows}), path, compression="none")
    expected = (
        "a page of column 'text' is 4 MiB in memory, needed 3 or less; write the file again with small "
        "pages, by pyarrow: write_table(read_table(FILE), NEW_FILE, row_group_size=3)"
    )
    assert refusal(path) == expected
    with pytest.raises(UserError) as caught:
        parquet.row_group_bytes(str(path), "text")
    assert str(caught.value) == f"{path}: {expected}"
    pq.write_table(pa.table({"text": rows}), path)
    assert refusal(path).startswith("a page of column 'text' is 7 MiB in memory")
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    assert [text for _, text in rows_of(path)] == rows
    # Zstandard is unpacked a megabyte at a time.
    pq.write_table(pa.table({"text": rows}), path, compression="zstd")
    assert [text for _, text in rows_of(path)] == rows
    pq.write_table(pa.table({"text": rows}), path, compression="lz4")
    assert refusal(path).startswith("a page of column 'text' is compressed by LZ4, needed SNAPPY, GZIP,")
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    pq.write_table(pa.table({"text": rows}), path, use_dictionary=False, column_encoding=encoding)
    assert refusal(path).startswith("a page of column 'text' is encoded in an unusual way")
    pq.write_table(pa.table({"text": rows[:7]}), path, use_dictionary=False, column_encoding=encoding)
    assert [text for _, text in rows_of(path)] == rows[:7]
    monkeypatch.setattr(parquet_headers, "MAX_DICTIONARY_TEXTS", 7)
    pq.write_table(pa.table({"text": rows}), path, compression="none")
    monkeypatch.setattr(parquet_headers, "MAX_HELD_BYTES", 30 << 20)
    assert refusal(path).startswith("a page of column 'text' is a dictionary of 16 texts, needed 7 or fewer")


def test_a_huge_page_behind_small_ones_is_found_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    texts = ["a" * 90] * 20 + ["b" * 5000]
    options: dict[str, Any] = {"use_dictionary": False, "data_page_size": 100, "write_batch_size": 1}
    pq.write_table(pa.table({"text": texts}), path, **options)
    set_huge(monkeypatch, 1000)
    assert [text for _, text in rows_of(path)] == texts
    monkeypatch.setattr(parquet_headers, "MAX_HELD_BYTES", 2000)
    assert len(parquet.row_group_bytes(str(path), "text")) == 1
    assert refusal(path).startswith("a page of column 'text' is 0 MiB in memory, needed 0 or less; write")


def test_a_scratch_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    set_huge(monkeypatch, 0)
    with pytest.raises(
        UserError, match=r"/none: cannot be written: No such file or directory; check"
    ) as caught:
        list(read_all(path, scratch=tmp_path / "none"))
    assert caught.value.exit_code == 1


# What follows is written by hand: no writer makes such pages, or none that can be installed by pip.

NOT_USABLE = "not a usable Parquet file ("
TWO, DICTIONARY = b"\3\0\0\0one\3\0\0\0two", b"\2\0\0\0AA\2\0\0\0BB"
BOTH_VALID = b"\2\0\0\0\4\1"


def varint(n: int) -> bytes:
    low = b""
    while n > 127:
        low, n = low + bytes([n & 127 | 128]), n >> 7
    return low + bytes([n])


def struct(*fields: tuple[int, Any]) -> bytes:
    """A struct of Thrift's compact protocol; a value is a number of 32 bits, a bool, or (kind, bytes)."""
    out, last = b"", 0
    for number, value in fields:
        if isinstance(value, bool):
            kind, raw = 1 if value else 2, b""
        elif isinstance(value, int):
            kind, raw = 5, varint(value << 1)
        else:
            kind, raw = value
        out, last = out + bytes([(number - last) << 4 | kind]) + raw, number
    return out + b"\0"


def texts_of(*texts: bytes) -> tuple[int, bytes]:
    return 9, bytes([len(texts) << 4 | 8]) + b"".join(varint(len(text)) + text for text in texts)


def structs(*items: bytes) -> tuple[int, bytes]:
    return 9, bytes([len(items) << 4 | 12]) + b"".join(items)


def page(content: bytes, values: int, *more: tuple[int, Any], encoding: int = 0, levels: int = 3) -> bytes:
    own = struct((1, values), (2, encoding), (3, levels), (4, 3), *more)
    return struct((1, 0), (2, len(content)), (3, len(content)), (5, (12, own))) + content


def page_v2(levels: bytes, content: bytes, values: int, nulls: int, unpacked: int) -> bytes:
    own = struct((1, values), (2, nulls), (3, values), (4, 0), (5, len(levels)), (6, 0), (7, True))
    sizes = (2, len(levels) + unpacked), (3, len(levels) + len(content))
    return struct((1, 3), *sizes, (8, (12, own))) + levels + content


def dictionary(content: bytes, values: int = 2) -> bytes:
    own = struct((1, values), (2, 0))
    return struct((1, 2), (2, len(content)), (3, len(content)), (7, (12, own))) + content


def write(path: Path, pages: list[bytes], rows: int, *, optional: bool = True, codec: int = 0) -> None:
    """A file of one column `text` in one row group."""
    body = b"PAR1" + b"".join(pages)
    encodings = (9, b"\x35\x00\x06\x10")
    size = (6, varint(1 << 21)), (7, (6, varint(len(body) - 4 << 1)))
    column = struct(
        (1, 6),
        (2, encodings),
        (3, texts_of(b"text")),
        (4, codec),
        (5, (6, varint(rows << 1))),
        (6, size[0]),
        size[1],
        (9, (6, varint(8))),
    )
    chunk = struct((2, (6, varint(8))), (3, (12, column)))
    group = struct((1, structs(chunk)), (2, size[0]), (3, (6, varint(rows << 1))))
    schema = [
        struct((4, (8, b"\4root")), (5, 1)),
        struct((1, 6), (3, int(optional)), (4, (8, b"\4text")), (6, 0)),
    ]
    footer = struct((1, 1), (2, structs(*schema)), (3, (6, varint(rows << 1))), (4, structs(group)))
    path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def read_by_hand(path: Path) -> list[bytes | None] | str:
    try:
        parquet.row_group_bytes(str(path), "text")
        return [None if row.cell is None else bytes(row.cell) for row in read_all(path)]
    except UserError as error:
        message = str(error).removeprefix(f"{path}: {NOT_USABLE}")
        assert message.endswith("); copy or make it again")
        return message.removesuffix("); copy or make it again")


@pytest.mark.parametrize(
    ("pages", "rows", "expected"),
    [
        ([page(BOTH_VALID + TWO, 2)], 2, [b"one", b"two"]),
        ([page(BOTH_VALID + TWO + b"more", 2)], 2, [b"one", b"two"]),
        ([page(BOTH_VALID + TWO[:-4], 2)], 2, "ends in a page"),
        ([page(BOTH_VALID + TWO[:7] + b"\0\0\0", 2)], 2, "ends in a page"),
        ([page(BOTH_VALID + b"\xff\xff\xff\xff" + TWO, 2)], 2, "ends in a page"),
        ([page(BOTH_VALID + TWO, 2)[:-9]], 2, "ends in a page"),
        ([page(b"\1\0\0\0\4" + TWO, 2)], 2, "ends in a page"),
        ([page(b"\2\0\0\0\4\5" + TWO, 2)], 2, "5 among numbers of 1 bits"),
        ([page(b"\x08\0\0\0" + varint(1 << 31 | 1) + b"\xff\xff" + TWO, 99)], 99, "ends in a page"),
        ([page(b"\x0b\0\0\0" + varint(1 << 63) + b"\1" + TWO, 2)], 2, "a run of more than 31 bits"),
        ([page(b"\xff\xff\xff\x7f" + TWO, 2)], 2, "a page whose nulls take 2147483647 bytes"),
        ([page(BOTH_VALID + TWO, 2), page(BOTH_VALID + TWO, 2)], 3, "row group 0 has 4 of 3 rows"),
        ([page(BOTH_VALID + TWO, 1 << 31)], 2, "the header of a page is damaged"),
        ([struct((2, 9), (3, 9)) + TWO], 2, "the header of a page is damaged"),
        ([b"\x11" * 9999], 2, "the header of a page is damaged"),
        ([page(BOTH_VALID + TWO, 2, (9, (9, b"\x25\2\4")), (10, (7, b"8 bytes.")))], 2, [b"one", b"two"]),
        (
            [page(BOTH_VALID + TWO, 2, (9, (11, b"\1\x85\2hi\6")), (10, (10, b"\x21\1\2")))],
            2,
            [b"one", b"two"],
        ),
    ],
    ids=count(),
)
def test_pages_by_hand(
    pages: list[bytes], rows: int, expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_huge(monkeypatch, 0)
    write(tmp_path / "a.parquet", pages, rows)
    assert read_by_hand(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize(
    ("pages", "rows", "expected"),
    [
        ([page(BOTH_VALID + b"\1\3\1", 2, encoding=8)], 2, [b"BB", b"AA"]),
        # No places where there are only nulls.
        ([page(b"\2\0\0\0\4\0", 2, encoding=8), page(BOTH_VALID + b"\1\4\1", 2, encoding=8)], 4, None),
        ([page(BOTH_VALID + b"\1\4", 2, encoding=8)], 2, "ends in a page"),
        ([page(BOTH_VALID + b"\2\4\2", 2, encoding=8)], 2, "text 2 of a dictionary of 2"),
        ([page(BOTH_VALID + b"\x21\4\2", 2, encoding=8)], 2, "places in a dictionary of 33 bits"),
        ([page(BOTH_VALID + b"\1\3\1", 2, encoding=8), dictionary(DICTIONARY)] * 2, 4, "two dictionaries"),
    ],
    ids=count(),
)
def test_dictionaries_by_hand(
    pages: list[bytes], rows: int, expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_huge(monkeypatch, 0)
    write(tmp_path / "a.parquet", [dictionary(DICTIONARY), *pages], rows)
    assert read_by_hand(tmp_path / "a.parquet") == (expected or [None, None, b"BB", b"BB"])


def test_a_dictionary_whose_last_text_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_huge(monkeypatch, 0)
    pages = [dictionary(DICTIONARY[:-1]), page(BOTH_VALID + b"\1\4\0", 2, encoding=8)]
    write(tmp_path / "a.parquet", pages, 2)
    assert read_by_hand(tmp_path / "a.parquet") == "ends in a dictionary"


def test_pages_as_writers_of_java_make_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing, "compressed" to nothing; and levels named by another encoding where there are none."""
    set_huge(monkeypatch, 0)
    path, packed = tmp_path / "a.parquet", pa.compress(TWO, codec="snappy", asbytes=True)
    write(path, [page_v2(b"\4\0", b"", 2, 2, 0), page_v2(b"\4\1", packed, 2, 0, len(TWO))], 4, codec=1)
    assert read_by_hand(path) == [None, None, b"one", b"two"]
    write(path, [page(TWO, 2, levels=4)], 2, optional=False)
    assert read_by_hand(path) == [b"one", b"two"]


def test_a_text_that_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_huge(monkeypatch, 0)
    path = tmp_path / "a.parquet"
    for dictionary in (True, False):
        pq.write_table(pa.table({"text": ["one", "x" * 99, "two"]}), path, use_dictionary=dictionary)
        assert [row.cell for row in read_all(path, longest_bytes=98)] == [b"one", TooLong(99), b"two"]


def test_names_with_dots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    both = pa.table({"a": pa.array([{"text": "inner"}]), "a.text": ["outer"], "text": ["right"]})
    pq.write_table(both, path)
    for size in (0, 1 << 20):
        set_huge(monkeypatch, size)
        assert rows_of(path) == [(1, "right")]
        with pytest.raises(UserError, match=r"2 columns 'a\.text', needed one; rename the others"):
            parquet.row_group_bytes(str(path), "a.text")
