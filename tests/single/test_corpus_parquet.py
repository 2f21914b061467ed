"""Huge pages of Parquet, which do not go through pyarrow. Its own reader says what is in them."""

import random
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdlm.config import UserError
from hvdlm.corpus import parquet, parquet_headers

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


def rows_of(path: Path, first: int = 0) -> list[tuple[int, str | None]]:
    """What is read from a row group on, and that the rest of the file's folder is as before."""
    groups = range(first, pq.ParquetFile(path).num_row_groups)
    before = sorted(path.parent.iterdir())
    rows = [
        (row.number, None if row.cell is None else bytes(row.cell).decode())
        for row in parquet.read_rows(str(path), "text", groups, path.parent)
    ]
    assert sorted(path.parent.iterdir()) == before
    return rows


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(parquet.read_rows(str(path), "text", range(1), path.parent))
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
                rows = parquet.read_rows(str(path), "text", range(1), tmp_path)
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
        list(parquet.read_rows(str(path), "text", range(1), tmp_path / "none"))
    assert caught.value.exit_code == 1
