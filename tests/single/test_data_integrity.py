"""Nothing that was damaged is taken for what was written: flipped bits, truncations, 500 mutations.

Every damage goes through the command, as a user would find it, and through the loader, as training would.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from data_sets import flip_bit, make_data_set
from test_data_manifest import mutate, sign, use

from hvdlm.config import UserError
from hvdlm.data.entries import ShardEntry
from hvdlm.data.manifest import FILE_NAME, Manifest
from hvdlm.data.verify import verify_blocks
from hvdlm.dataset.__main__ import main

SIZES = {"train-00000": 3000, "train-00001": 1300, "val-00000": 1200}
_LIMIT_S = 20


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, make_data_set(tmp_path, SIZES)[0]


@contextmanager
def in_time() -> Iterator[None]:
    """A hang is a failure."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(folder: Path) -> int:
    """The exit code of `dataset verify`; an error is one line."""
    with in_time():
        try:
            return main(["verify", str(folder), "--workers", "1"])
        except UserError as error:
            assert "\n" not in str(error)
            return error.exit_code


def trained_on(folder: Path) -> np.ndarray | None:
    """The tokens that training and evaluation read; None where they are refused, in one line."""
    with in_time():
        try:
            return use(folder)
        except UserError as error:
            assert "\n" not in str(error)
            return None


def flips(entry: ShardEntry, content: bytes, rng: random.Random) -> Iterator[int]:
    """200 places in a shard: attributes, HDF5's structures, each data set, and anywhere."""
    attribute = content.index(b"tokenizer_sha256")
    extents = vars(entry.extents).values()
    regions = [
        (0, 96),
        (attribute - 300, attribute + 300),
        (0, entry.extents.tokens.offset),
        (0, len(content)),
    ]
    regions += [(extent.offset, extent.end) for extent in extents]
    for number in range(200):
        yield rng.randrange(*regions[number % len(regions)])


def test_every_flipped_bit_of_a_shard_is_reported(
    data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = data
    entry, rng = manifest.shards[0], random.Random(7)
    path = folder / entry.name
    assert verdict(folder) == 0
    for place in flips(entry, path.read_bytes(), rng):
        bit = rng.randrange(8)
        capsys.readouterr()
        flip_bit(path, place, bit)
        assert verdict(folder) == 1, (place, bit)
        first, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{path}: bad: ")
        assert last.endswith(": 1 bad")
        flip_bit(path, place, bit)
    assert verdict(folder) == 0


def test_every_flipped_bit_of_the_manifest_is_refused(data: tuple[Path, Manifest]) -> None:
    folder, rng = data[0], random.Random(8)
    path = folder / FILE_NAME
    for _ in range(200):
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip_bit(path, place, bit)
        assert verdict(folder) == 2, (place, bit)
        flip_bit(path, place, bit)


def test_every_truncation_is_reported(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    rng = random.Random(9)
    for name, code in ((manifest.shards[0].name, 1), (FILE_NAME, 2)):
        path = folder / name
        content = path.read_bytes()
        lengths = [
            0,
            1,
            len(content) // 2,
            len(content) - 1,
            *(rng.randrange(len(content)) for _ in range(60)),
        ]
        if name != FILE_NAME:
            lengths += [extent.end - 1 for extent in vars(manifest.shards[0].extents).values()]
        for length in lengths:
            path.write_bytes(content[:length])
            # The last byte of the manifest is a newline: without it nothing is lost.
            harmless = name == FILE_NAME and length == len(content) - 1
            assert verdict(folder) == (0 if harmless else code), length
            assert harmless or trained_on(folder) is None
        path.write_bytes(content)


def changed(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a file, damaged as disks, copies and editors do."""
    first = rng.randrange(len(content))
    size = rng.choice([1, 2, 8, 60, 4096])
    part = content[first : first + size]
    before, after = content[:first], content[first + size :]
    pasted = rng.choice([b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"-"])
    instead = rng.choice(
        [bytes(len(part)), rng.randbytes(len(part)), b"", part + part, part[::-1], pasted + part]
    )
    flipped = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:]
    return rng.choice([before + instead + after, before + flipped + after, content + part])


def test_damaged_manifests_are_refused(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    path, rng = folder / FILE_NAME, random.Random(10)
    content, refused = path.read_bytes(), 0
    for _ in range(150):
        path.write_bytes(damaged := changed(content, rng))
        code, tokens = verdict(folder), trained_on(folder)
        refused += code == 2
        assert (code == 2) == (tokens is None)
        # What is accepted says the same.
        assert code == 2 or json.loads(damaged) == json.loads(content)
    assert refused > 100
    assert manifest


def test_forged_manifests_give_no_other_tokens_unnoticed(data: tuple[Path, Manifest]) -> None:
    """As an attacker would: with every digest over the manifest made right."""
    folder, manifest = data
    expected, rng, refused = use(folder), random.Random(11), 0
    shards = json.loads(manifest.to_json())["shards"]
    for _ in range(200):
        record = json.loads(manifest.to_json())
        if rng.random() < 0.2:
            # Ids that exist, in the file, at the wrong place: only the blocks' digests tell.
            rng.choice(record["shards"])["extents"]["tokens"]["offset"] -= 2 * rng.randrange(1, 200)
        else:
            mutate(record, rng)
        try:
            entries = tuple(ShardEntry(**shard) for shard in record["shards"])
            record["fingerprint"] = Manifest(manifest.tokenizer, entries).fingerprint
        except (KeyError, TypeError, ValueError):
            pass
        try:
            (folder / FILE_NAME).write_text(sign(record))
        except (ValueError, UnicodeEncodeError):
            continue
        code, tokens = verdict(folder), trained_on(folder)
        refused += code == 2
        if code == 0 and tokens is not None and not np.array_equal(tokens, expected):
            # Another data set, of some of the same shards; a run that consumed the first refuses it.
            assert all(shard in shards for shard in record["shards"]), record
            assert record["fingerprint"] != manifest.fingerprint
    assert refused > 100


def test_damaged_shards_are_reported_and_give_no_other_tokens_unnoticed(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    expected, rng = use(folder), random.Random(12)
    contents = {entry.name: (folder / entry.name).read_bytes() for entry in manifest.shards}
    for _ in range(150):
        name = rng.choice(list(contents))
        damaged = (
            contents[rng.choice(list(contents))] if rng.random() < 0.05 else changed(contents[name], rng)
        )
        (folder / name).write_bytes(damaged)
        tokens = trained_on(folder)
        if damaged != contents[name]:
            assert verdict(folder) == 1
        if tokens is not None and not np.array_equal(tokens, expected):
            # Training compares the blocks while it runs.
            assert list(verify_blocks(folder, manifest, share=(0, 1)))
        (folder / name).write_bytes(contents[name])
