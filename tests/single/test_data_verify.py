from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_sets import (
    EOS,
    TOKENIZER_BYTES,
    flip_bit,
    make_data_set,
    overwrite,
    random_documents,
    tokenizer_info,
)

from hvdlm.config import UserError
from hvdlm.data.digests import digest_blocks, digest_content, digest_file
from hvdlm.data.entries import BLOCK_TOKENS, Extent, Extents, ShardEntry
from hvdlm.data.manifest import Manifest, write_manifest
from hvdlm.data.shards import write_shard
from hvdlm.data.sources import Source
from hvdlm.data.verify import BackgroundVerifier, block_count, require_intact, verify_blocks
from hvdlm.data.verify_all import Verification, share_by_size, verify_folder, verify_shard
from tests import helpers

SIZES = {"train-00000": BLOCK_TOKENS * 2 + 5, "train-00001": 3000, "val-00000": BLOCK_TOKENS + 1}
BLOCKS = 3 + 1 + 2


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, make_data_set(tmp_path, SIZES)[0]


def found(folder: Path) -> list[tuple[str, int | None]]:
    return [(problem.file, problem.block) for problem in verify_folder(folder)]


def test_an_intact_data_set_has_no_problem(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    assert verify_folder(folder) == []
    with Verification(folder, manifest, manifest.shards, workers=2) as verification:
        assert verification.wait(60.0)
        assert verification.take_bytes() == sum(entry.file_bytes for entry in manifest.shards)
        assert verification.problems() == []


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_bit_in_the_tokens_names_shard_and_block(data: tuple[Path, Manifest], block: int) -> None:
    folder, manifest = data
    entry = manifest.shards[0]
    flip_bit(folder / entry.name, entry.extents.tokens.offset + 2 * BLOCK_TOKENS * block + 7)
    flip_bit(folder / "val-00000.h5", manifest.shards[2].extents.tokens.offset)
    assert found(folder) == [(entry.name, block), ("val-00000.h5", 0)]
    first = block * BLOCK_TOKENS
    last = min(first + BLOCK_TOKENS, entry.tokens) - 1
    message = f"train-00000.h5: block {block}: tokens {first} to {last} do not match their digest"
    assert str(verify_folder(folder)[0]) == message
    problems = list(verify_blocks(folder, manifest, share=(0, 1)))
    assert [(p.file, p.block) for p in problems] == [(entry.name, block), ("val-00000.h5", 0)]


def test_a_flipped_bit_in_the_digest_table_does_not_accuse_the_tokens(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    flip_bit(folder / "train-00000.h5", manifest.shards[0].extents.block_xxh3.offset + 8)
    (problem,) = verify_folder(folder)
    assert problem.block is None
    assert "table of block digests is damaged, its tokens are intact" in problem.message


def test_a_flipped_bit_in_the_documents_or_elsewhere_is_found(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    path, entry = folder / "train-00001.h5", manifest.shards[1]
    for offset in (entry.extents.doc_offsets.offset, entry.extents.doc_offsets.offset + 8 * 20):
        flip_bit(path, offset)
        assert "doc_offsets" in verify_folder(folder)[0].message
        flip_bit(path, offset)
    for offset in (0, 9, 700, entry.extents.tokens.offset - 1):
        flip_bit(path, offset)
        assert "outside its tokens" in verify_folder(folder)[0].message
        flip_bit(path, offset)
    assert verify_folder(folder) == []


def test_truncated_grown_missing_and_special_files_are_named(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    path, size = folder / "train-00001.h5", manifest.shards[1].file_bytes
    for length in (size - 1, size + 1, 1 << 20, 0):
        os.truncate(path, length)
        (problem,) = verify_folder(folder)
        assert problem.file == path.name
        assert f"has {length} bytes, the manifest says {size}" in problem.message
    path.unlink()
    assert "missing" in verify_folder(folder)[0].message
    os.mkfifo(path)
    assert "not a regular file" in verify_folder(folder)[0].message
    (problem,) = verify_blocks(folder, manifest, share=(0, 1))
    assert "not a regular file" in problem.message


def test_another_tokenizer_is_noticed(data: tuple[Path, Manifest]) -> None:
    folder, _ = data
    (folder / "tokenizer.json").write_bytes(TOKENIZER_BYTES + b" ")
    assert [problem.message for problem in verify_folder(folder)] == [
        "not the tokenizer that made the shards (sha256)"
    ]
    (folder / "tokenizer.json").unlink()
    assert "cannot be read: No such file" in verify_folder(folder)[0].message
    with pytest.raises(
        UserError, match=r"no manifest.json, so no data set; run python -m hvdlm.preprocess --out"
    ):
        verify_folder(folder / "nowhere")


def forge(folder: Path, name: str, ids: np.ndarray) -> None:
    """Put other tokens into a shard and make every digest right again, as a broken writer would."""
    info = tokenizer_info()
    good, offsets = random_documents(len(ids), seed=1)
    entry = write_shard(folder / name, good, offsets, split="train", text_bytes=1, tokenizer=info)
    with h5py.File(folder / name, "r+") as file:
        file["tokens"][:] = ids
        file["block_xxh3"][:] = blocks = digest_blocks(ids.astype("<u2"))
    digests = {"xxh3_128": digest_file(folder / name), "content_xxh3_128": digest_content(blocks, offsets)}
    write_manifest(folder, [replace(entry, **digests)], tokenizer=info)


def test_right_digests_of_wrong_content_are_not_enough(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER_BYTES)
    ids, offsets = random_documents(BLOCK_TOKENS + 100, seed=1)
    forge(tmp_path, "train-00000.h5", ids)
    assert verify_folder(tmp_path) == []
    beyond = ids.copy()
    beyond[BLOCK_TOKENS + 3] = 300
    forge(tmp_path, "train-00000.h5", beyond)
    assert [str(p) for p in verify_folder(tmp_path)] == ["train-00000.h5: block 1: holds an id beyond 299"]
    for document in (0, int(np.searchsorted(offsets, BLOCK_TOKENS)), -1):
        endless = ids.copy()
        endless[offsets[1:][document] - 1] = EOS + 1
        forge(tmp_path, "train-00000.h5", endless)
        (problem,) = verify_folder(tmp_path)
        assert problem.message == "a document does not end with id 0"
        assert problem.block == (offsets[1:][document] - 1) // BLOCK_TOKENS


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 6, 9])
def test_shares_check_every_block_exactly_once(data: tuple[Path, Manifest], parts: int) -> None:
    folder, manifest = data
    for entry in manifest.shards:
        table = entry.extents.block_xxh3
        overwrite(folder / entry.name, table.offset, bytes(8 * table.size))
    shares = [list(verify_blocks(folder, manifest, share=(d, parts))) for d in range(parts)]
    places = [(problem.file, problem.block) for share in shares for problem in share]
    assert len(places) == len(set(places)) == BLOCKS
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("known", [[], [[0, 2]], [[1, 2], [3, 5]], [[2, 6]], [[0, BLOCKS]]])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_known_blocks_are_left_out_and_the_others_shared(
    data: tuple[Path, Manifest], known: list[list[int]], parts: int
) -> None:
    folder, manifest = data
    assert block_count(manifest) == BLOCKS
    for entry in manifest.shards:
        table = entry.extents.block_xxh3
        overwrite(folder / entry.name, table.offset, bytes(8 * table.size))
    shares = [list(verify_blocks(folder, manifest, share=(d, parts), known=known)) for d in range(parts)]
    places = [(problem.file, problem.block) for share in shares for problem in share]
    every = [(entry.name, k) for entry in manifest.shards for k in range(entry.extents.block_xxh3.size)]
    assert places == [place for k, place in enumerate(every) if not any(a <= k < b for a, b in known)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_background_verifier_tells_what_it_found_intact(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(0, 1), known=[[[1, 3]]])
    wait_for(verifier)
    assert verifier.intact() == [[[0, 1], [3, BLOCKS]]]
    flip_bit(folder / "val-00000.h5", manifest.shards[2].extents.tokens.offset)
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(0, 1), known=[[[1, 3]]])
    wait_for(verifier)
    assert verifier.intact() == [[[0, 1], [3, 4]]]
    assert "val-00000.h5: block 0" in str(verifier.problem())
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(1, 2), bytes_per_s=1.0)
    helpers.wait_until(lambda: bool(verifier.intact()[0]), within_s=10, what="a block was read")
    verifier.close()
    assert verifier.intact() == [[[3, 4]]], "then it slept"


def test_verification_keeps_to_its_speed_and_stops_when_asked(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    started = time.monotonic()
    assert list(verify_blocks(folder, manifest, share=(0, 1), bytes_per_s=2e7)) == []
    assert time.monotonic() - started > 0.2
    stop = threading.Event()
    stop.set()
    assert list(verify_blocks(folder, manifest, share=(0, 1), bytes_per_s=1.0, stop=stop)) == []


def wait_for(verifier: BackgroundVerifier) -> None:
    for _ in range(1000):
        if verifier.done():
            return
        time.sleep(0.01)
    raise AssertionError("the verifier did not end")


def test_the_background_verifier_reports_the_first_problem_with_a_cure(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(0, 1))
    wait_for(verifier)
    assert verifier.problem() is None
    flip_bit(folder / "val-00000.h5", manifest.shards[2].extents.tokens.offset)
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(1, 2))
    wait_for(verifier)
    verifier.close()
    assert (verifier.problem() or "").startswith(
        f"{folder}/val-00000.h5: block 0: tokens 0 to 1048575 do not match their digest; "
        f"run python -m hvdlm.dataset repair {folder}"
    )


def test_what_to_do_is_said_once_and_can_be_done(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    path = folder / manifest.shards[0].name
    whole = path.read_bytes()
    for imported in (False, True):
        if imported:
            (folder / "preprocess.json").unlink()
        for content in (whole[:-1], whole[:-9] + b"\0" + whole[-8:]):
            path.write_bytes(content)
            verifier = BackgroundVerifier([Source(folder, manifest)], share=(0, 1), bytes_per_s=0.0)
            verifier._thread.join(30)
            told = verifier.problem()
            if told is None:
                continue
            assert told.count("dataset repair") == (not imported)
            assert told.count("import the data set again") == imported
            assert told.count("copy the file again") == 1
    path.unlink()
    path.mkdir()
    verifier = BackgroundVerifier([Source(folder, manifest)], share=(0, 1), bytes_per_s=0.0)
    verifier._thread.join(30)
    assert "not a regular file" in str(verifier.problem())


def test_the_background_verifier_goes_through_all_sources(
    data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    manifest, _ = make_data_set(other, {"train-00000": 5000})
    flip_bit(other / "train-00000.h5", manifest.shards[0].extents.tokens.offset)
    verifier = BackgroundVerifier([Source(*data), Source(other, manifest)], share=(0, 1))
    wait_for(verifier)
    assert (verifier.problem() or "").startswith(f"{other}/train-00000.h5: block 0: ")


def test_a_cure_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "my set"
    manifest, _ = make_data_set(folder, {"train-00000": 500, "val-00000": 500})
    flip_bit(folder / "train-00000.h5", manifest.shards[0].extents.tokens.offset)
    require_intact(Source(folder, manifest), share=(0, 1), splits=("val",))
    with pytest.raises(UserError, match=f"train-00000.h5: block 0: .*hvdlm.dataset repair '{folder}', or"):
        require_intact(Source(folder, manifest), share=(0, 1))


def test_a_slow_background_verifier_closes_at_once(data: tuple[Path, Manifest]) -> None:
    verifier = BackgroundVerifier([Source(*data)], share=(0, 1), bytes_per_s=1.0)
    started = time.monotonic()
    verifier.close()
    assert verifier.done()
    assert verifier.problem() is None
    assert time.monotonic() - started < 4


def test_a_hostile_structure_with_right_digests_is_a_problem(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    entry = manifest.shards[1]
    with h5py.File(folder / entry.name, "r+") as file:
        file["more"] = h5py.ExternalLink("/etc/passwd", "/")
    size = (folder / entry.name).stat().st_size
    forged = replace(entry, file_bytes=size, xxh3_128=digest_file(folder / entry.name))
    write_manifest(folder, [manifest.shards[0], forged, manifest.shards[2]], tokenizer=manifest.tokenizer)
    (problem,) = verify_folder(folder)
    assert str(problem) == "train-00001.h5: must hold exactly block_xxh3, doc_offsets, tokens"


def test_neither_training_nor_its_verification_imports_hdf5() -> None:
    script = "import sys; sys.modules['h5py'] = None; import hvdlm.data.loader, hvdlm.data.verify"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_shards_are_dealt_out_by_size_each_once() -> None:
    sizes = [7, 100, 1, 50, 50, 3, 2, 90]
    entry = ShardEntry("", "train", 1, 1, 1, 0, "", "", Extents(*[Extent(0, "<u2", 1)] * 3))
    shards = [replace(entry, name=f"train-{i}.h5", file_bytes=size) for i, size in enumerate(sizes)]
    for parts in (1, 2, 3, 8, 11):
        shares = share_by_size(shards, parts)
        assert len(shares) == parts
        assert sorted(shard.name for share in shares for shard in share) == [s.name for s in shards]
        loads = [sum(shard.file_bytes for shard in share) for share in shares]
        assert max(loads) <= max(100, sum(sizes) / parts * 4 / 3)
    assert share_by_size(shards, 3) == share_by_size(shards[::-1], 3)


def test_workers_find_the_same_in_the_order_of_the_manifest(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    for entry in manifest.shards:
        flip_bit(folder / entry.name, entry.extents.tokens.offset)
    assert verify_folder(folder, workers=3) == verify_folder(folder)
    assert [problem.file for problem in verify_folder(folder, workers=3)] == [e.name for e in manifest.shards]


def test_a_verification_ends_when_it_is_left(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    entry = manifest.shards[0]
    stop = threading.Event()
    read: list[int] = []

    def report(new_bytes: int) -> None:
        read.append(new_bytes)
        stop.set()

    flip_bit(folder / entry.name, entry.extents.tokens.offset)
    assert verify_shard(folder / entry.name, entry, manifest.tokenizer, report=report, stop=stop) == []
    assert sum(read) < entry.file_bytes
    with Verification(folder, manifest, manifest.shards, workers=1):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verify")]


def test_a_wrong_boundary_of_documents_is_found_by_one_share_while_training(tmp_path: Path) -> None:
    """Documents that are kept apart by it would otherwise be others."""
    manifest, _ = make_data_set(tmp_path, {"train-00000": 3000, "val-00000": 100})
    extent = manifest.shards[0].extents.doc_offsets
    assert not list(verify_blocks(tmp_path, manifest, share=(0, 1)))
    flip_bit(tmp_path / "train-00000.h5", extent.offset + 8 * 20)
    shares = [list(verify_blocks(tmp_path, manifest, share=(d, 2))) for d in range(2)]
    assert [[str(p) for p in problems] for problems in shares] == [
        ["train-00000.h5: its doc_offsets or its block digests are damaged"],
        [],
    ]
