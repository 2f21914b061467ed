"""A checkpoint is written while the run goes on, and holds what was there when it began."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from hvdlm.comm.launch import Launch
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import UserError
from hvdlm.parallel.strategy import Piece
from hvdlm.run import checkpoint, restore
from hvdlm.run import snapshot as snapshots
from hvdlm.run.saver import Saver
from hvdlm.run.snapshot import Snapshot
from tests import helpers

ALONE = World(Launch("single"))


def piece(name: str, values: torch.Tensor) -> Piece:
    return Piece(name, tuple(values.shape), (0,) * values.dim(), values)


def state(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "attempt": 1, **more}


def test_every_dtype_and_shape_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        str(dtype): (torch.arange(7 * i) % 2).to(dtype).view(7, i)
        for i, dtype in enumerate(
            [
                *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
                *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
            ]
        )
    }
    tensors["scalar"] = torch.tensor(3.5)
    tensors["a column, é"] = torch.arange(12.0).view(3, 4)[:, 1]
    snapshot = Snapshot("rank-00000.safetensors")
    snapshot.take(piece(name, values) for name, values in tensors.items())
    digest = snapshot.write(tmp_path)
    content = (tmp_path / "rank-00000.safetensors").read_bytes()
    assert digest == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    assert snapshot.file_bytes == len(content)
    found = load_file(tmp_path / "rank-00000.safetensors")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


@pytest.mark.parametrize("on", ["disk", "tmpfs"])
def test_a_large_file_is_written_past_the_cache_where_that_is_possible(
    on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pages are written, and the file ends where its last tensor does."""
    written, flags = [], []
    write = snapshots.write_exactly

    def watch(fd: int, chunk: memoryview, offset: int) -> None:
        flags.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        written.append((offset, chunk.nbytes))
        write(fd, chunk, offset)

    monkeypatch.setattr(snapshots, "write_exactly", watch)
    disk = helpers.small_disk(tmp_path / "disk", size_kib=2**15) if on == "tmpfs" else nullcontext()
    with disk:
        folder = tmp_path / "disk" if on == "tmpfs" else tmp_path
        tensors = {"a": torch.randn(2**20 + 1), "b": torch.arange(2**18 + 3, dtype=torch.int16)}
        snapshot = Snapshot("rank-00000.safetensors")
        snapshot.take(piece(name, values) for name, values in tensors.items())
        digest = snapshot.write(folder)
        content = (folder / "rank-00000.safetensors").read_bytes()
        assert digest == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
        found = load_file(folder / "rank-00000.safetensors")
        assert all(torch.equal(found[name], values) for name, values in tensors.items())
    assert all(offset % 4096 == 0 and count % 4096 == 0 for offset, count in written)
    assert sum(count for _, count in written) >= len(content)
    if on == "disk" and Path("/sys/fs/ext4").exists():
        assert all(flags)


def test_a_file_system_that_takes_no_direct_writes_after_all_gets_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = snapshots.write_exactly

    def refuse(fd: int, chunk: memoryview, offset: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        write(fd, chunk, offset)

    monkeypatch.setattr(snapshots, "write_exactly", refuse)
    values = torch.randn(2**21)
    snapshot = Snapshot("rank-00000.safetensors")
    snapshot.take([piece("a", values)])
    snapshot.write(tmp_path)
    assert torch.equal(load_file(tmp_path / "rank-00000.safetensors")["a"], values)


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, best = torch.arange(6.0), [{"step": 1, "val_loss": 2.0}]
    go_on = threading.Event()
    write = Snapshot.write
    monkeypatch.setattr(
        Snapshot, "write", lambda self, folder, **more: (go_on.wait(), write(self, folder, **more))[1]
    )
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", values)], state(1, best=best))
    assert saver.in_flight
    assert saver.writing
    values += 1
    best.clear()
    with pytest.raises(RuntimeError, match="in flight"):
        saver.begin([piece("model.x", values)], state(2))
    assert restore.folders(tmp_path) == []
    go_on.set()
    saved = saver.finish()
    assert saved is not None
    assert (saved.step, saver.in_flight, saver.writing) == (1, False, False)
    opened = restore.open_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(opened.read("model.x", (0,), (6,)), torch.arange(6.0))
    assert opened.state["best"] == saved.state["best"] == [{"step": 1, "val_loss": 2.0}]
    assert saved.size_bytes == sum(
        f.stat().st_size for f in opened.folder.iterdir() if f.name != restore.MANIFEST
    )
    assert saver.finish() is None


def test_memory_is_kept_from_save_to_save(tmp_path: Path) -> None:
    snapshot = Snapshot("rank-00000.safetensors")
    places = set()
    for step in range(3):
        snapshot.take([piece("model.x", torch.full((2**20,), float(step)))])
        places.add(snapshot._memory.data_ptr())
    assert len(places) == 1
    snapshot.write(tmp_path)
    assert load_file(tmp_path / "rank-00000.safetensors")["model.x"][0] == 2
    snapshot.take([piece("model.x", torch.ones(5))])
    assert snapshot.file_bytes < 200


@pytest.mark.parametrize("where", ["begin", "commit"])
def test_who_lost_the_run_commits_nothing(where: str, tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.ones(2))], state(1))
    saver.finish()
    other = tmp_path / "step-00000002.tmp-7"

    def lost() -> None:
        raise UserError("another start took over")

    if where == "begin":
        other.mkdir()
        with pytest.raises(AgreedError, match="took over"):
            saver.begin([], state(2), before=lost)
        assert other.exists()
    else:
        saver.begin([piece("model.x", torch.ones(2))], state(2))
        with pytest.raises(AgreedError, match="took over"):
            saver.finish(before=lost)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]


def test_an_error_that_is_no_disks_reaches_the_main_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Snapshot, "write", lambda self, folder, **more: 1 // 0)
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.ones(2))], state(1))
    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert restore.folders(tmp_path) == []


def test_a_save_that_is_given_up_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is half a checkpoint, which nobody takes for one and the next save deletes."""
    written, go_on, write = [], threading.Event(), snapshots.write_exactly

    def watch(fd: int, chunk: memoryview, offset: int) -> None:
        written.append(offset)
        write(fd, chunk, offset)
        if offset:
            go_on.wait(10)

    monkeypatch.setattr(snapshots, "write_exactly", watch)
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.zeros(2**23))], state(1))
    helpers.wait_until(lambda: any(written), within_s=10, what="the second piece of the file")
    threading.Timer(0.2, go_on.set).start()
    saver.abandon()
    assert not saver.in_flight
    assert max(written) < 2**25 - 2**22
    assert restore.folders(tmp_path) == []
    assert saver.finish() is None
    saver.begin([piece("model.x", torch.zeros(2))], state(1))
    saver.finish()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001"]


def test_a_full_disk_is_said_and_left_as_it_was(tmp_path: Path) -> None:
    """With a first file that fits and a second that does not, whatever the free space said before."""
    disk = tmp_path / "disk"
    with helpers.small_disk(disk, size_kib=1024):
        for files, values in (({}, torch.ones(2**18)), ({"a": bytes(2**21)}, torch.ones(2))):
            saver = Saver(disk, ALONE, files=files)
            saver.begin([piece("model.x", values)], state(2))
            with pytest.raises(AgreedError, match=r"rank 0: .*step-00000002.*No space left.*free space"):
                saver.finish()
            assert list(disk.iterdir()) == []


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path: Path) -> None:
    """All bits of all bytes of all files."""
    saver = Saver(tmp_path, ALONE, files={"config.toml": b"x = 1\n", "tokenizer.json": b"{}\n"})
    for step in (1, 2):
        saver.begin(
            [piece("model.x", torch.arange(2.0)), piece("optim.count", torch.tensor(1.0))], state(step)
        )
        saver.finish()
    folder = tmp_path / "step-00000002"
    files = sorted(folder.iterdir())
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        for place in range(len(content)):
            for bit in range(8):
                damaged = bytearray(content)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                assert restore.find_problem(folder), (path.name, place, bit)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert restore.find_problem(folder), (path.name, length)
        for longer in (content + b"\n", content + b"\0", b" " + content):
            path.write_bytes(longer)
            assert restore.find_problem(folder), path.name
        path.write_bytes(content)
    assert restore.find_problem(folder) is None


@pytest.mark.parametrize(
    "name", ["MANIFEST.json", "config.toml", "rank-00000.safetensors", "state.json", "rank-00001.safetensors"]
)
def test_with_a_file_too_few_or_too_many_the_one_before_is_taken(name: str, tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, files={"config.toml": b"x = 1\n"})
    for step in (1, 2):
        saver.begin([piece("model.x", torch.arange(2.0))], state(step))
        saver.finish()
    path = tmp_path / "step-00000002" / name
    if path.exists():
        path.unlink()
    else:
        path.write_bytes(b"")
    found, notes = restore.newest_valid(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert name in notes[0]


def test_what_people_put_beside_it_does_no_harm(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.arange(2.0))], state(1))
    saver.finish()
    for name in (checkpoint.KEEP, "notes.txt", ".nfs0001"):
        (tmp_path / "step-00000001" / name).touch()
    assert restore.find_problem(tmp_path / "step-00000001") is None


def test_a_manifest_is_written_in_one_way(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.arange(2.0))], state(1))
    saver.finish()
    path = tmp_path / "step-00000001" / restore.MANIFEST
    manifest = json.loads(path.read_text())
    twice = path.read_text().replace('"version": 1', '"version": 2, "version": 1')
    for other in (json.dumps(manifest, indent=1), json.dumps(manifest), twice):
        path.write_text(other)
        assert restore.find_problem(path.parent) == "MANIFEST.json is not as it was written"


def test_what_a_kill_left_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / "step-00000009.tmp-3"
    left.mkdir()
    (left / "rank-00002.safetensors").write_bytes(os.urandom(10))
    (tmp_path / ".tmp-0123456789ab-LATEST").touch()
    saver = Saver(tmp_path, ALONE, files={})
    saver.begin([piece("model.x", torch.ones(2))], state(4))
    saver.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000004"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_copies_into_pinned_memory_of_the_right_size(tmp_path: Path) -> None:
    snapshot = Snapshot("rank-00000.safetensors")
    for elements in (2**25 + 5, 2**25 + 5, 1000):
        values = torch.randn(elements, device="cuda")
        snapshot.take([piece("x", values)])
        assert snapshot._memory.is_pinned()
        assert snapshot._memory.numel() < 4 * elements + 2**13
        (tmp_path / snapshot.file).unlink(missing_ok=True)
        snapshot.write(tmp_path)
        assert torch.equal(load_file(tmp_path / snapshot.file)["x"], values.cpu())
    memory = snapshot._memory
    del snapshot
    assert not memory.is_pinned()
