from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from data_sets import random_documents, tokenizer_info

from hvdlm.config import UserError
from hvdlm.data.digests import digest_blocks
from hvdlm.data.entries import MalformedError, ShardEntry
from hvdlm.data.files import TEMP_PREFIX
from hvdlm.data.shards import ALIGNMENT, write_shard
from hvdlm.data.structure import check_structure


def write(path: Path, count: int, *, vocab_size: int = 300) -> tuple[ShardEntry, np.ndarray, np.ndarray]:
    ids, offsets = random_documents(count, seed=count, vocab_size=vocab_size)
    info = tokenizer_info(vocab_size)
    return write_shard(path, ids, offsets, split="train", text_bytes=7, tokenizer=info), ids, offsets


@pytest.mark.parametrize("count", [1, 100, 5000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_any_hdf5_tool_reads_what_was_written(tmp_path: Path, count: int) -> None:
    path = tmp_path / "train-00000.h5"
    entry, ids, offsets = write(path, count)
    with h5py.File(path) as file:
        assert (file["tokens"][:] == ids).all()
        assert (file["doc_offsets"][:] == offsets).all()
        assert file["tokens"].dtype == "<u2"
        assert file["doc_offsets"].dtype == file["block_xxh3"].dtype == "<u8"
        stored = ids.astype("<u2")
        expected = [
            xxhash.xxh3_64_intdigest(stored[s : s + (1 << 20)].tobytes()) for s in range(0, count, 1 << 20)
        ]
        assert file["block_xxh3"][:].tolist() == expected
        assert file["tokens"].chunks is None
        assert dict(file.attrs) == {
            "format": b"hvdlm-shard",
            "version": 1,
            "split": b"train",
            "tokenizer_sha256": tokenizer_info().sha256.encode(),
            "vocab_size": 300,
            "eos_id": 0,
            "tokens": count,
            "documents": len(offsets) - 1,
            "text_bytes": 7,
        }
    assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert entry.file_bytes == path.stat().st_size
    check_structure(path, entry, tokenizer_info())


@pytest.mark.parametrize("count", [1, 3000, 2_000_000])
def test_the_manifests_positions_are_the_data_and_tokens_are_aligned(tmp_path: Path, count: int) -> None:
    path = tmp_path / "train-00000.h5"
    entry, ids, offsets = write(path, count)
    for extent, expected in ((entry.extents.tokens, ids), (entry.extents.doc_offsets, offsets)):
        found = np.fromfile(path, extent.dtype, extent.size, offset=extent.offset)
        assert (found == expected).all()
    assert entry.extents.tokens.offset % ALIGNMENT == 0


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
def test_h5dump_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.h5"
    _, ids, _ = write(path, 20)
    shown = subprocess.run(
        ["h5dump", "-y", "-w", "0", "-d", "/tokens", path], capture_output=True, text=True, check=True
    )
    assert ", ".join(map(str, ids)) in re.sub(r"\s+", " ", shown.stdout)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_two_bytes_an_id_exactly_while_the_largest_id_fits(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    entry, ids, _ = write(tmp_path / "train-00000.h5", 5000, vocab_size=vocab_size)
    assert entry.extents.tokens.dtype == dtype
    with h5py.File(tmp_path / "train-00000.h5") as file:
        assert (file["tokens"][:] == ids).all()


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, _, _ = write(tmp_path / "train-00000.h5", 70_000)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import time; time.sleep(1.1);"
        "from test_data_shards import write; write(Path(sys.argv[2]), 70_000)"
    )
    other = tmp_path / "other" / "train-00000.h5"
    other.parent.mkdir()
    subprocess.run([sys.executable, "-c", script, Path(__file__).parent, other], check=True)
    assert other.read_bytes() == (tmp_path / "train-00000.h5").read_bytes()
    assert write(other, 70_000)[0] == first


def test_the_content_digest_depends_on_tokens_and_documents_alone(tmp_path: Path) -> None:
    ids, offsets = random_documents(1000, seed=1)
    info, path = tokenizer_info(), tmp_path / "train-00000.h5"
    entry = write_shard(path, ids, offsets, split="train", text_bytes=1, tokenizer=info)
    assert (
        write_shard(path, ids, offsets, split="val", text_bytes=2, tokenizer=info).content_xxh3_128
        == entry.content_xxh3_128
    )
    merged = np.delete(offsets, 1)
    assert (
        write_shard(path, ids, merged, split="train", text_bytes=1, tokenizer=info).content_xxh3_128
        != entry.content_xxh3_128
    )
    assert (digest_blocks(ids.astype("<u2")) != digest_blocks(ids.astype("<u4"))).all()


@pytest.mark.parametrize(
    ("ids", "offsets", "reason"),
    [
        ([5, 300, 0], [0, 3], "token id"),
        ([5, -1, 0], [0, 3], "token id"),
        ([5.0, 1.0, 0.0], [0, 3], "token id"),
        ([5, 6, 7], [0, 3], "eos"),
        ([5, 0, 7, 0], [0, 3, 4], "eos"),
        ([5, 0], [0, 0, 2], "rise"),
        ([5, 0], [0, 1], "rise"),
        ([5, 0], [1, 2], "rise"),
        ([], [0], "at least one document"),
        ([[5, 0]], [0, 2], "one-dimensional"),
    ],
)
def test_what_is_no_document_is_not_written(
    tmp_path: Path, ids: list, offsets: list[int], reason: str
) -> None:
    path = tmp_path / "train-00000.h5"
    with pytest.raises(ValueError, match=reason):
        write_shard(
            path, np.array(ids), np.array(offsets), split="train", text_bytes=1, tokenizer=tokenizer_info()
        )
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_shard(tmp_path: Path) -> None:
    """Killed at the moments that matter: laid out but not filled; filled but not renamed."""
    for place in ("_fill", "digest_file"):
        folder = tmp_path / place
        folder.mkdir()
        script = (
            "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
            "from test_data_shards import write; import hvdlm.data.shards as shards;"
            f"shards.{place} = lambda *a, **b: os.kill(os.getpid(), signal.SIGKILL);"
            "write(Path(sys.argv[2]) / 'train-00000.h5', 50_000)"
        )
        done = subprocess.run([sys.executable, "-c", script, Path(__file__).parent, folder])
        assert done.returncode == -signal.SIGKILL
        (left,) = folder.iterdir()
        assert left.name.startswith(TEMP_PREFIX)
        write(folder / "train-00000.h5", 50_000)


def can_mount(folder: Path) -> bool:
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("free", ["some", "none"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, free: str) -> None:
    """On a file system of 1 MiB that is empty, and on one that is full before HDF5 lays the file out."""
    if shutil.which("unshare") is None or not can_mount(tmp_path):
        pytest.skip("no right to mount a small file system")
    fill = "Path(sys.argv[2], 'ballast').write_bytes(bytes(1 << 20));" if free == "none" else ""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from test_data_shards import write; from hvdlm.config import run_command;"
        f"{fill} code = run_command('x', lambda: write(Path(sys.argv[2], 'train-00000.h5'), 2_000_000));"
        "print(code, [p.name for p in Path(sys.argv[2]).iterdir()])"
    )
    mount = 'mount -t tmpfs -o size=1m none "$0"; exec "$@"'
    python = [sys.executable, "-c", script, Path(__file__).parent, tmp_path]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", mount, tmp_path, *python], capture_output=True, text=True
    )
    assert re.fullmatch(
        r"hvdlm x: error: .*/train-00000.h5: cannot be written: No space left on device; free space .*\n",
        done.stderr,
    )
    assert done.stdout == ("1 ['ballast']\n" if free == "none" else "1 []\n")


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-00000\.h5: cannot be written: No such file or directory"):
        write(tmp_path / "nowhere" / "train-00000.h5", 10)


def hostile(path: Path, entry: ShardEntry, kind: str) -> None:
    """Rebuild a shard with something wrong in its structure."""
    extent = entry.extents.tokens
    with h5py.File(path, "r+") as file:
        ids = file["tokens"][:]
        if kind == "attribute missing":
            del file.attrs["eos_id"]
        elif kind == "attribute extra":
            file.attrs["extra"] = 1
        elif kind == "attribute type":
            file.attrs["eos_id"] = 0.0
        elif kind == "attribute array":
            file.attrs["eos_id"] = np.zeros(3, "<u8")
        elif kind == "attribute vlen":
            file.attrs["format"] = "hvdlm-shard"
        elif kind == "attribute value":
            file.attrs["vocab_size"] = np.uint64(299)
        elif kind == "newer":
            file.attrs["version"] = np.uint64(2)
        elif kind == "data set extra":
            file["more"] = ids
        elif kind == "data set attribute":
            file["tokens"].attrs["x"] = 1
        else:
            del file["tokens"]
        if kind == "external link":
            file["tokens"] = h5py.ExternalLink("other.h5", "/tokens")
        elif kind == "soft link":
            file["tokens"] = h5py.SoftLink("/doc_offsets")
        elif kind == "external storage":
            file.create_dataset("tokens", ids.shape, "<u2", external=[("/etc/passwd", 0, 2 * len(ids))])
        elif kind == "virtual":
            layout = h5py.VirtualLayout(ids.shape, "<u2")
            layout[:] = h5py.VirtualSource("missing.h5", "tokens", ids.shape)
            file.create_virtual_dataset("tokens", layout)
        elif kind == "chunked":
            file.create_dataset("tokens", data=ids, chunks=(64,))
        elif kind == "compressed":
            file.create_dataset("tokens", data=ids, chunks=(64,), compression="gzip")
        elif kind == "dtype":
            file["tokens"] = ids.astype("<i2")
        elif kind == "big endian":
            file["tokens"] = ids.astype(">u2")
        elif kind == "shape":
            file["tokens"] = ids[None]
        elif kind == "absurd size":
            create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            create.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
            h5py.h5d.create(
                file.id, b"tokens", h5py.h5t.STD_U16LE, h5py.h5s.create_simple((1 << 60,)), create
            )
        elif kind == "group":
            file.create_group("tokens")
        elif kind == "elsewhere":
            file["tokens"] = ids
            assert file["tokens"].id.get_offset() != extent.offset


KINDS = {
    "attribute missing": "exactly the attributes",
    "attribute extra": "exactly the attributes",
    "attribute type": "eos_id must be",
    "attribute array": "eos_id must be one value",
    "attribute vlen": "format must be",
    "attribute value": "vocab_size is 299, the manifest says 300",
    "newer": "version is 2, this hvdlm reads 1: update",
    "data set extra": "must hold exactly",
    "data set attribute": "has attributes",
    "external link": "tokens is a link",
    "soft link": "tokens is a link",
    "external storage": "external storage",
    "virtual": "not contiguous",
    "chunked": "not contiguous",
    "compressed": "not contiguous",
    "dtype": "tokens is not of type <u2",
    "big endian": "tokens is not of type <u2",
    "shape": "tokens is not of shape",
    "absurd size": "tokens is not of shape",
    "group": "tokens is not a data set",
    "elsewhere": "does not lie where",
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train-00000.h5"
    entry, _, _ = write(path, 3000)
    check_structure(path, entry, tokenizer_info())
    hostile(path, entry, kind)
    with pytest.raises(MalformedError, match=re.escape(KINDS[kind])):
        check_structure(path, entry, tokenizer_info())


def test_no_hdf5_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.h5"
    entry, _, _ = write(path, 3000)
    path.write_bytes(os.urandom(5000))
    with pytest.raises(MalformedError, match="HDF5 cannot read it"):
        check_structure(path, entry, tokenizer_info())


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "train-00000.h5", 3000)[0]
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:1000], offset))
    assert write(tmp_path / "train-00000.h5", 3000)[0] == expected
