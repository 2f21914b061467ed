from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from data_sets import flip_bit, make_data_set, tokenizer_info

from hvdlm.config import UserError
from hvdlm.data.documents import read_document
from hvdlm.data.entries import Extent, MalformedError, ShardEntry
from hvdlm.data.loader import BatchPlan, Loader, evaluation_batches
from hvdlm.data.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from hvdlm.data.sources import Source
from hvdlm.data.verify import verify_blocks
from hvdlm.data.verify_all import verify_folder

SIZES = {"train-00000": 2000, "train-00001": 1300, "val-00000": 1200}
PLAN = BatchPlan(seq_len=16, global_batch=8, micro_batch=4, seed=0)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, make_data_set(tmp_path, SIZES)[0]


def sign(record: Any) -> str:
    """A manifest with its digest made right, whatever it says."""
    if isinstance(record, dict):
        record.pop("digest", None)
        plain = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        record["digest"] = xxhash.xxh3_128_hexdigest(plain)
    return json.dumps(record)


def test_it_says_what_the_shards_hold(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    assert read_manifest(folder) == manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert [entry.name for entry in manifest.split("train")] == ["train-00000.h5", "train-00001.h5"]
    assert (manifest.tokens("train"), manifest.tokens("val")) == (3300, 1200)
    assert (manifest.documents("train"), manifest.documents("val")) == (66, 24)
    assert manifest.text_bytes("val") == 3600
    assert manifest.split("test") == []
    for entry in manifest.shards:
        for extent in vars(entry.extents).values():
            assert extent.end <= (folder / entry.name).stat().st_size == entry.file_bytes


def test_the_order_of_entries_given_does_not_matter(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    before = (folder / FILE_NAME).read_bytes()
    write_manifest(folder, manifest.shards[::-1], tokenizer=manifest.tokenizer)
    assert (folder / FILE_NAME).read_bytes() == before


def test_the_fingerprint_follows_content_not_paths(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = data
    assert make_data_set(tmp_path / "elsewhere", SIZES)[0].fingerprint == manifest.fingerprint
    renamed = replace(manifest.shards[0], name="train-00000a.h5")
    assert Manifest(manifest.tokenizer, (renamed, *manifest.shards[1:])).fingerprint == manifest.fingerprint
    for other in (
        Manifest(replace(manifest.tokenizer, sha256="0" * 64), manifest.shards),
        Manifest(manifest.tokenizer, manifest.shards[::-1]),
        Manifest(manifest.tokenizer, manifest.shards[:-1]),
        Manifest(manifest.tokenizer, (replace(manifest.shards[0], split="val"), *manifest.shards[1:])),
    ):
        assert other.fingerprint != manifest.fingerprint
    assert (
        make_data_set(tmp_path / "more", {**SIZES, "val-00000": 1201})[0].fingerprint != manifest.fingerprint
    )


def test_ten_thousand_shards_are_read_without_touching_one(tmp_path: Path) -> None:
    entry = make_data_set(tmp_path, {"train-00000": 100})[0].shards[0]
    entries = [replace(entry, name=f"train-{i:05}.h5") for i in range(10_000)]
    write_manifest(tmp_path / ".", entries, tokenizer=tokenizer_info())
    assert read_manifest(tmp_path).tokens("train") == 1_000_000


def test_a_folder_without_a_manifest_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            UserError, match=rf"{folder}: no manifest.json.*preprocess --out {folder}$"
        ) as caught:
            read_manifest(folder)
        assert caught.value.exit_code == 2


def set_in(path: str, value: Any) -> Callable[[dict], None]:
    """Change one value deep in a record."""

    def change(record: dict) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            record = record[key]
        record[last] = value

    return change


TOKENS = "shards/0/extents/tokens"
CHANGES = {
    "version is 2, this hvdlm reads 1: update hvdlm": set_in("version", 2),
    "version is True": set_in("version", True),
    "format is not": set_in("format", "other"),
    "needs exactly the fields": set_in("more", 1),
    "shards must be list": set_in("shards", {}),
    "tokenizer must be dict": set_in("tokenizer", None),
    "file must be a plain name": set_in("tokenizer/file", "../tokenizer.json"),
    "sha256 must be 64": set_in("tokenizer/sha256", "AB" * 32),
    "needs 0 <= eos_id < vocab_size": set_in("tokenizer/eos_id", 300),
    "name must be a plain file name": set_in("shards/0/name", "../x.h5"),
    "name must be a plain file name ending": set_in("shards/0/name", "/etc/passwd"),
    "name must be a plain": set_in("shards/0/name", "a\n.h5"),
    "two shards have one name": set_in("shards/0/name", "train-00001.h5"),
    "split must be one of train, val": set_in("shards/0/split", "test"),
    "tokens is out of range": set_in("shards/0/tokens", -1),
    "tokens must be int": set_in("shards/0/tokens", 2000.0),
    "documents must be int": set_in("shards/0/documents", True),
    "text_bytes is out of range": set_in("shards/0/text_bytes", 1 << 44),
    "32 hexadecimal digits": set_in("shards/0/xxh3_128", "x" * 32),
    "offset is out of range": set_in(f"{TOKENS}/offset", -4096),
    "tokens ends after the file": set_in(f"{TOKENS}/offset", 1 << 40),
    "data sets overlap": set_in("shards/0/extents/block_xxh3/offset", 1 << 20),
    "tokens must be <u2 [2000], is '<u4'": set_in(f"{TOKENS}/dtype", "<u4"),
    "tokens must be <u2 [2000], is '|O'": set_in(f"{TOKENS}/dtype", "|O"),
    "tokens must be <u2 [2000], is '<u2' [1999]": set_in(f"{TOKENS}/size", 1999),
    "doc_offsets must be <u8 [41]": set_in("shards/0/extents/doc_offsets/size", 42),
    "block_xxh3 must be <u8 [1]": set_in("shards/0/extents/block_xxh3/size", 0),
    "needs 1 <= documents <= tokens": set_in("shards/0/documents", 0),
    "shard 0: needs exactly": set_in("shards/0", []),
    "fingerprint does not match": set_in("fingerprint", "0" * 64),
    "fingerprint does not": set_in("shards/0/content_xxh3_128", "0" * 32),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_manifest_that_contradicts_itself_is_refused_for_its_reason(
    data: tuple[Path, Manifest], reason: str
) -> None:
    folder, manifest = data
    record = json.loads(manifest.to_json())
    CHANGES[reason](record)
    (folder / FILE_NAME).write_text(sign(record))
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{folder / FILE_NAME}: not a usable manifest (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"format": "hvdlm-dataset", "version": ' + b"9" * 5000 + b"}",
        b'{"format": "hvdlm-dataset", "version": NaN}',
        b'{"format": "hvdlm-dataset", "version": 1e999}',
        b'{"format": "hvdlm-dataset", "version": {"x": "\\ud800\\n"}}',
        b"\0" * 1000,
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: not a") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_an_edit_without_a_new_digest_is_noticed(data: tuple[Path, Manifest]) -> None:
    path = data[0] / FILE_NAME
    path.write_text(path.read_text().replace('"text_bytes": 6000', '"text_bytes": 6001'))
    with pytest.raises(UserError, match="edited or damaged"):
        read_manifest(data[0])


def test_contradicting_entries_are_not_written(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    before = (folder / FILE_NAME).read_bytes()
    with pytest.raises(MalformedError, match="one name"):
        write_manifest(folder, manifest.shards + manifest.shards[:1], tokenizer=manifest.tokenizer)
    with pytest.raises(MalformedError, match="must be <u4"):
        write_manifest(folder, manifest.shards, tokenizer=tokenizer_info(70_000))
    with pytest.raises(MalformedError, match="64-bit"):
        write_manifest(folder, [replace(manifest.shards[0], tokens=1 << 70)], tokenizer=manifest.tokenizer)
    assert (folder / FILE_NAME).read_bytes() == before


def use(folder: Path) -> np.ndarray:
    """Everything that reads a data set; the tokens that training and evaluation see."""
    manifest = read_manifest(folder)
    verify_folder(folder)
    list(verify_blocks(folder, manifest, share=(0, 1)))
    read_document(folder, manifest, "train", 3)
    whole = evaluation_batches(
        [Source(folder, manifest)], "val", plan=BatchPlan(16, 4, 4, 0), share=(0, 1), limit_batches=0
    )
    seen = [batch["tokens"].numpy().ravel() for batch in whole]
    loader = Loader([Source(folder, manifest)], "train", plan=PLAN, share=(0, 1), prefetch_steps=2)
    try:
        for step in islice(loader.steps(0), 3):
            seen += [slot.batch["tokens"].numpy().ravel() for slot in step.slots]
    finally:
        loader.close()
    return np.concatenate(seen)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def mutate(record: Any, rng: random.Random) -> None:
    *keys, last = rng.choice(leaves(record))
    for key in keys:
        record = record[key]
    old = record[last]
    nearby = [old + 1, old - 1, old * 2, -old, old ^ 1 << 11] if type(old) is int else []
    strange = [
        None,
        True,
        0,
        -1,
        1.5,
        float("inf"),
        2**63,
        10**400,
        "",
        "../x",
        "<u2",
        "<f4",
        [],
        {},
        [[]],
        "\ud800",
    ]
    choice = rng.random()
    if choice < 0.1:
        del record[last]
    elif nearby and choice < 0.7:
        record[last] = rng.choice(nearby)
    else:
        record[last] = rng.choice(strange)


def test_mutated_manifests_never_give_a_traceback_or_other_tokens(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    expected, rng, refused = use(folder), random.Random(1), 0
    for _ in range(200):
        record = json.loads(manifest.to_json())
        mutate(record, rng)
        # As an attacker would: with every digest over the manifest made right.
        if isinstance(record.get("shards"), list):
            try:
                entries = tuple(ShardEntry(**s) for s in record["shards"])
                record["fingerprint"] = Manifest(manifest.tokenizer, entries).fingerprint
            except (TypeError, ValueError):
                pass
        try:
            (folder / FILE_NAME).write_text(sign(record))
        except (ValueError, UnicodeEncodeError):
            continue
        try:
            seen = use(folder)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert np.array_equal(seen, expected) or verify_folder(folder), record
    assert refused > 100


def test_mutated_shards_are_detected_and_never_give_a_traceback(data: tuple[Path, Manifest]) -> None:
    folder, manifest = data
    rng = random.Random(2)
    entry = manifest.shards[0]
    path, extents = folder / entry.name, entry.extents
    original = path.read_bytes()
    starts = [0, 0, 4096, extents.tokens.offset, extents.doc_offsets.offset, extents.block_xxh3.offset]
    for _ in range(60):
        for _ in range(rng.choice([1, 1, 3, 30])):
            flip_bit(
                path, min(rng.choice(starts) + rng.randrange(2000), entry.file_bytes - 1), rng.randrange(8)
            )
        if rng.random() < 0.2:
            path.write_bytes(path.read_bytes()[: rng.randrange(entry.file_bytes)])
        assert path.read_bytes() == original or verify_folder(folder)
        try:
            use(folder)
        except UserError as error:
            assert "\n" not in str(error)
        path.write_bytes(original)


def test_a_mutated_shard_with_a_right_whole_file_digest_is_detected_or_harmless(
    data: tuple[Path, Manifest],
) -> None:
    """Damage from before the manifest was made: HDF5 gets to see it."""
    folder, manifest = data
    rng = random.Random(3)
    entry = manifest.shards[0]
    path, original, expected = folder / entry.name, (folder / entry.name).read_bytes(), use(folder)
    for _ in range(150):
        flip_bit(path, rng.choice([0, 0, 0, 2048 + 168]) + rng.randrange(2000), rng.randrange(8))
        digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
        shards = (replace(entry, xxh3_128=digest), *manifest.shards[1:])
        write_manifest(folder, shards, tokenizer=manifest.tokenizer)
        if not verify_folder(folder):
            assert np.array_equal(use(folder), expected)
        path.write_bytes(original)


def test_extents_know_their_end() -> None:
    assert Extent(10, "<u4", 5).end == 30
