"""Token files of Megatron-LM and nanoGPT into shards, and shards into Megatron-LM's."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import xxhash
from data_sets import flip_bit, make_data_set

from hvdlm.config import UserError, run_command
from hvdlm.data import chunks, megatron
from hvdlm.data.chunks import Chunk, by_split
from hvdlm.data.documents import read_document
from hvdlm.data.manifest import Manifest, read_manifest
from hvdlm.data.verify_all import verify_folder
from hvdlm.dataset import import_
from hvdlm.dataset.__main__ import main
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import from_library
from tests import helpers

BYTE = from_library(TOKENIZERS["byte"]([], 0))
END = BYTE.eos_id


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "byte.json"
    path.write_bytes(BYTE.json_bytes)
    return path


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 60 bytes, as ids without eos."""
    choose = random.Random(seed)
    return [[choose.randrange(256) for _ in range(choose.randrange(1, 60))] for _ in range(count)]


def joined(documents: list[list[int]]) -> list[int]:
    return [id for ids in documents for id in ids]


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """Every document of a split, eos included."""
    manifest = read_manifest(folder)
    return [read_document(folder, manifest, split, k).tolist() for k in range(manifest.documents(split))]


def take_in(kind: str, source: Path, tokenizer: Path, out: Path, *more: str) -> Manifest:
    arguments = ["--format", kind, "--tokenizer", str(tokenizer), "--out", str(out), *more]
    assert main(["import", str(source), *arguments]) == 0
    assert verify_folder(out) == []
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".tmp")) == []
    return read_manifest(out)


def by_hash(documents: list[list[int]], fraction: float) -> dict[str, list[list[int]]]:
    """Where documents without eos belong."""
    parted: dict[str, list[list[int]]] = {"train": [], "val": []}
    for ids in documents:
        number = xxhash.xxh3_64_intdigest(np.array(ids, "<u4").tobytes())
        parted["val" if number < fraction * 2**64 else "train"].append([*ids, END])
    return parted


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_megatron_documents_arrive_whole_and_in_order(tmp_path: Path, tokenizer: Path, code: int) -> None:
    """Of one sequence or several, with eos or without, empty ones left out."""
    plain = texts(200)
    sources: list[list[list[int]]] = [[ids] for ids in plain]
    sources[3] = [plain[3][:1], plain[3][1:], [END]]
    sources[5] = [[*plain[5], END]]
    sources[7:7] = [[], [[]], [[], []]]
    foreign.write_megatron(tmp_path / "old.v1", [[], *sources, []], code=code)
    out = tmp_path / "out"
    manifest = take_in("megatron", tmp_path / "old.v1", tokenizer, out, "--val-fraction", "0.2")
    expected = by_hash(plain, 0.2)
    for split, documents in expected.items():
        assert documents_of(out, split) == documents
        assert manifest.text_bytes(split) == sum(len(ids) - 1 for ids in documents)
    assert len(expected["val"]) > 20


def test_nanogpt_documents_are_cut_at_eos(tmp_path: Path, tokenizer: Path) -> None:
    plain = texts(200)
    flat = [id for ids in plain for id in (*ids, END)]
    np.array(flat[:-1], "<u2").tofile(tmp_path / "train.bin")
    take_in("nanogpt", tmp_path / "train.bin", tokenizer, tmp_path / "out", "--val-fraction", "0.3")
    for split, documents in by_hash(plain, 0.3).items():
        assert documents_of(tmp_path / "out", split) == documents


def test_validation_from_another_file_and_small_shards(tmp_path: Path, tokenizer: Path) -> None:
    """Also documents longer than a shard: cut as preprocess cuts them."""
    plain = [*texts(30), [7] * 31, [8] * 32, [9] * 100, [1], *texts(5, seed=1)]
    foreign.write_megatron(tmp_path / "a", [[ids] for ids in plain])
    foreign.write_megatron(tmp_path / "b", [[[1, 2, 3]]])
    more = ["--val", str(tmp_path / "b.idx"), "--shard-tokens", "32"]
    manifest = take_in("megatron", tmp_path / "a.bin", tokenizer, tmp_path / "out", *more)
    cut = [[*ids[i : i + 31], END] for ids in plain for i in range(0, len(ids), 31)]
    assert documents_of(tmp_path / "out", "train") == cut
    assert documents_of(tmp_path / "out", "val") == [[1, 2, 3, END]]
    shards = manifest.split("train")
    assert all(entry.tokens <= 32 for entry in shards)
    # As many to a shard as fit: no shard could have taken the first document of the next.
    first = 0
    for entry in shards[:-1]:
        first += entry.documents
        assert entry.tokens + len(cut[first]) > 32, entry


def test_the_same_input_gives_the_same_bytes_whatever_the_chunks(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "HASHED_TOKENS", 40)  # Documents that go on beyond what is hashed.
    foreign.write_megatron(tmp_path / "a", [[ids] for ids in texts(300)])
    contents = []
    for number, (chunk_tokens, block) in enumerate([(1 << 20, 1 << 17), (7, 3), (50, 1)]):
        monkeypatch.setattr(megatron, "CHUNK_TOKENS", chunk_tokens)
        monkeypatch.setattr(megatron, "_BLOCK", block)
        out = tmp_path / f"out{number}"
        take_in("megatron", tmp_path / "a", tokenizer, out, "--shard-tokens", "500", "--val-fraction", "0.3")
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) > 15


def test_a_document_goes_by_its_first_ids_in_whatever_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "HASHED_TOKENS", 10)
    choose = random.Random(3)
    documents = [[choose.randrange(200)] * choose.choice([1, 9, 10, 11, 12, 40]) + [END] for _ in range(200)]
    flat = np.array(joined(documents), "<u2")
    ends = np.cumsum([len(ids) for ids in documents])
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for ids in documents:
        number = xxhash.xxh3_64_intdigest(np.array(ids[:-1][:10], "<u4").tobytes())
        expected["val" if number < 2**63 else "train"] += ids
    for step in (1, 3, 10, 11, 64, 10_000):
        pieces = (
            Chunk(flat[a : a + step], ends[(ends > a) & (ends <= a + step)] - a)
            for a in range(0, len(flat), step)
        )
        got: dict[str, list[int]] = {"train": [], "val": []}
        last: dict[str, list[int]] = {"train": [], "val": []}
        for split, chunk in by_split(pieces, 0.5):
            last[split] += (chunk.ends + len(got[split])).tolist()
            got[split] += chunk.tokens.tolist()
        assert got == expected
        assert last == {
            split: (np.flatnonzero(np.array(ids) == END) + 1).tolist() for split, ids in got.items()
        }


PEAK = """
import re, sys
from pathlib import Path
from hvdlm.dataset.__main__ import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_shards(tmp_path: Path, tokenizer: Path) -> None:
    """Nor with the file: 64 MB of tokens, all of one shard, beside 4 MB."""
    peaks_mib = []
    for number, count in enumerate((1 << 21, 1 << 25)):
        ids = np.random.default_rng(0).integers(0, 256, count, dtype="<u2")
        ids[999::1000] = END
        path, out = tmp_path / f"{number}.bin", tmp_path / f"out{number}"
        ids.tofile(path)
        arguments = ["import", str(path), "--format", "nanogpt", "--tokenizer", str(tokenizer)]
        # Else glibc keeps what was freed, up to 20 MiB in one run, none in the next. Source: mallopt(3).
        env = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = helpers.run([sys.executable, "-c", PEAK, *arguments, "--out", str(out)], env=env)
        assert done.returncode == 0, done.stdout
        peaks_mib.append(int(done.stdout.split()[-1]) / 1024)
        assert len(read_manifest(out).split("train")) == 1
    assert peaks_mib[1] < peaks_mib[0] + 16, peaks_mib


def test_a_full_disk_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    np.array([*[1] * 99, END] * 20_000, "<u2").tofile(tmp_path / "a.bin")
    with helpers.small_disk(tmp_path / "small", size_kib=1024):
        arguments = [str(tmp_path / "a.bin"), "--format", "nanogpt", "--tokenizer", str(tokenizer)]
        with pytest.raises(UserError, match="No space left on device; free space") as caught:
            main(["import", *arguments, "--out", str(tmp_path / "small" / "out")])
        assert caught.value.exit_code == 1
        assert not (tmp_path / "small" / "out").exists()


def test_export_and_import_are_inverse(tmp_path: Path, tokenizer: Path) -> None:
    foreign.write_megatron(tmp_path / "a", [[[*ids, END]] for ids in [*texts(300), []]])
    out = tmp_path / "out"
    first = take_in(
        "megatron", tmp_path / "a", tokenizer, out, "--val-fraction", "0.3", "--shard-tokens", "900"
    )
    assert main(["export", str(out), "--format", "megatron", "--out", str(tmp_path / "new" / "x.y")]) == 0
    assert len(list((tmp_path / "new").iterdir())) == 4
    for split in ("train", "val"):
        assert foreign.read_megatron(tmp_path / "new" / f"x.y_{split}") == (8, documents_of(out, split))
    prefix = tmp_path / "new" / "x.y_train"
    more = ["--val", str(tmp_path / "new" / "x.y_val"), "--shard-tokens", "900"]
    again = take_in("megatron", prefix, tokenizer, tmp_path / "again", *more)
    assert again == first


def test_export_takes_the_types_that_megatron_itself_would(tmp_path: Path) -> None:
    for number, (vocab_size, code) in enumerate([(65_499, 8), (65_500, 4), (65_537, 4)]):
        folder = tmp_path / str(number)
        manifest, tokens = make_data_set(folder, {"train-00000": (1 << 20) + 77}, vocab_size=vocab_size)
        assert main(["export", str(folder), "--out", f"{folder}.x"]) == 0
        found, documents = foreign.read_megatron(Path(f"{folder}.x_train"))
        assert found == code
        assert len(documents) == manifest.documents("train")
        assert np.array_equal(np.concatenate(documents), tokens["train-00000.h5"])


def test_export_writes_nothing_that_was_damaged(tmp_path: Path) -> None:
    manifest, _ = make_data_set(tmp_path / "d", {"train-00000": 3000, "train-00001": 3000})
    entry, path = manifest.shards[1], tmp_path / "d" / "train-00001.h5"
    for extent, said in ((entry.extents.tokens, "block 0"), (entry.extents.doc_offsets, "doc_offsets")):
        flip_bit(path, extent.offset + 8)
        with pytest.raises(UserError, match=rf"train-00001\.h5: .*{said}"):
            main(["export", str(tmp_path / "d"), "--out", str(tmp_path / "e" / "x")])
        flip_bit(path, extent.offset + 8)
        assert list((tmp_path / "e").iterdir()) == []
    assert main(["export", str(tmp_path / "d"), "--out", str(tmp_path / "e" / "x")]) == 0
    with pytest.raises(UserError, match=r"x_train\.bin: is already there"):
        main(["export", str(tmp_path / "d"), "--out", str(tmp_path / "e" / "x")])


def refused(tmp_path: Path, *arguments: str) -> str:
    """The line that an import ends with; nothing is left of it."""
    with pytest.raises(UserError) as caught:
        main(["import", *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_truncated_or_foreign_file_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    files = foreign.write_megatron(tmp_path / "a", [[ids] for ids in texts(50)])
    common = [str(tmp_path / "a"), "--format", "megatron", "--tokenizer", str(tokenizer)]
    for suffix, content in files.items():
        path = tmp_path / f"a.{suffix}"
        for length in (0, 5, 33, 34, len(content) // 2, len(content) - 1, len(content) + 1):
            path.write_bytes((content + b"\0")[:length])
            assert "a.idx: not a usable index" in refused(tmp_path, *common)
        path.unlink()
        assert f"a.{suffix}: cannot be read: No such file" in refused(tmp_path, *common)
        path.write_bytes(content)
    (tmp_path / "a.idx").write_bytes(files["idx"] + bytes(50))
    assert "multimodal" in refused(tmp_path, *common)
    nano = [str(tmp_path / "n"), "--format", "nanogpt", "--tokenizer", str(tokenizer)]
    for content, said in (
        (b"", "has 0 bytes"),
        (b"abc", "has 3 bytes"),
        (np.array([20240520, 1, 5], "<i4").tobytes(), "header of llm.c"),
        (np.array([1, 2, 259], "<u2").tobytes(), "token 2 is 259, the tokenizer has ids 0 to 258"),
        (np.array([1, 2], "<u2").tobytes(), "a split is empty"),
    ):
        (tmp_path / "n").write_bytes(content)
        assert said in refused(tmp_path, *nano)
    nano[0] = str(tmp_path / "a.bin")
    assert "it is of Megatron-LM" in refused(tmp_path, *nano)


def test_documents_that_do_not_rise_from_one_block_of_the_index_to_the_next(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "_BLOCK", 4)
    files = foreign.write_megatron(tmp_path / "a", [[ids] for ids in texts(6)])
    entries = np.frombuffer(files["idx"][-56:], "<i8").copy()
    assert entries.tolist() == [0, 1, 2, 3, 4, 5, 6]
    common = [str(tmp_path / "a"), "--format", "megatron", "--tokenizer", str(tokenizer)]
    for wrong in ([0, 0, 0, 0, 3, 1, 6], [0, 1, 2, 3, 5, 4, 6], [0, 5, 4, 4, 4, 5, 6]):
        (tmp_path / "a.idx").write_bytes(files["idx"][:-56] + np.array(wrong, "<i8").tobytes())
        assert "its documents do not rise" in refused(tmp_path, *common)
    right = np.array([0, 0, 0, 0, 0, 5, 6], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(files["idx"][:-56] + right)
    foreign.write_megatron(tmp_path / "v", [[[1]]])
    manifest = take_in("megatron", tmp_path / "a", tokenizer, tmp_path / "out", "--val", str(tmp_path / "v"))
    assert manifest.documents("train") == 2


def test_a_mutated_index_is_one_line_or_the_same_documents(tmp_path: Path, tokenizer: Path) -> None:
    plain = texts(60)
    files = foreign.write_megatron(tmp_path / "a", [[ids] for ids in plain])
    common = ["--format", "megatron", "--tokenizer", str(tokenizer), "--val", str(tmp_path / "v")]
    foreign.write_megatron(tmp_path / "v", [[[1]]])
    choose, refusals = random.Random(5), 0
    for number in range(150):
        changed = bytearray(files["idx"])
        for _ in range(choose.choice([1, 1, 4])):
            place = choose.randrange(len(changed))
            changed[place] = choose.choice([changed[place] ^ 1 << choose.randrange(8), 0, 255])
        (tmp_path / "a.idx").write_bytes(changed)
        out = tmp_path / f"out{number}"
        try:
            main(["import", str(tmp_path / "a"), *common, "--out", str(out)])
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
            continue
        # What the index is free to say: which documents the same tokens are cut into.
        together = joined(documents_of(out, "train"))
        assert [id for id in together if id != END] == joined(plain)
    assert refusals > 100


def test_two_imports_into_one_folder(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, and the first one's work is left alone."""
    np.array(joined([[*ids, END] for ids in texts(400)]), "<u2").tofile(tmp_path / "a.bin")
    arguments = ["import", str(tmp_path / "a.bin"), "--format", "nanogpt", "--tokenizer", str(tokenizer)]
    arguments += ["--out", str(tmp_path / "out")]
    read, codes = import_.read_nanogpt, list[int]()

    def run() -> int:
        return run_command("dataset", lambda: main(arguments))

    def read_while_another_begins(*args: Any) -> Any:
        monkeypatch.setattr(import_, "read_nanogpt", read)
        codes.append(run())
        return read(*args)

    monkeypatch.setattr(import_, "read_nanogpt", read_while_another_begins)
    assert run() == 0
    assert codes == [2]
    assert "another program writes there; wait for it" in capsys.readouterr().err
    assert verify_folder(tmp_path / "out") == []


def test_bad_usage_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    foreign.write_megatron(tmp_path / "a", [[ids] for ids in texts(50)])
    common = [str(tmp_path / "a"), "--format", "megatron", "--tokenizer", str(tokenizer)]
    assert "needed more than 0" in refused(tmp_path, *common, "--val-fraction", "0")
    assert "needed 16 to" in refused(tmp_path, *common, "--shard-tokens", "3")
    assert "is both INPUT and --val" in refused(tmp_path, *common, "--val", str(tmp_path / "a.bin"))
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    (tmp_path / "again").symlink_to(tmp_path)
    assert "is both INPUT and --val" in refused(tmp_path, *common, "--val", f"{tmp_path}/again/a")
    for name, kind in ((".", "megatron"), ("/", "nanogpt")):
        assert f"{name}: is a folder; needed a" in refused(tmp_path, name, "--format", kind, *common[3:])
    long = refused(tmp_path, "x" * 300, "--format", "nanogpt", *common[3:])
    assert "File name too long" in long
    data = tmp_path / "data"
    make_data_set(data, {"train-00000": 500, "val-00000": 60})
    for name in (".", "/"):
        with pytest.raises(UserError, match=f"--out {name}: is a folder; needed the beginning of the files'"):
            main(["export", str(data), "--out", name])
    with pytest.raises(UserError, match="File name too long"):
        main(["export", str(data), "--out", "x" * 300])
    assert "has no such token" in refused(tmp_path, *common, "--eos", "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        main(["import", *common, "--out", str(tmp_path / "full")])
    with pytest.raises(UserError, match="cannot be made"):
        main(["import", *common, "--out", str(tmp_path / "full" / "file" / "x")])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
