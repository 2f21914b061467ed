"""Shards made again from their source."""

import json
import random
import shutil
from pathlib import Path

import pytest

from hvdlm.config import UserError, run_command
from hvdlm.corpus import plan, tokenizer_stage
from hvdlm.corpus.repair import repair
from hvdlm.data.manifest import read_manifest
from hvdlm.data.verify_all import verify_folder
from hvdlm.dataset import __main__ as dataset
from hvdlm.preprocess.__main__ import main
from hvdlm.text import fast
from hvdlm.text.gigatoken_encoder import PACKAGE, version


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of several tasks, with duplicates and a record that was rejected."""
    folder = tmp_path_factory.mktemp("repair")
    choose = random.Random(0)
    texts = [f"text {choose.randrange(500)} " * choose.randrange(1, 60) for _ in range(800)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts) + "bad\n"
    (folder / "a.jsonl").write_text(rows)
    arguments = [folder / "a.jsonl", "--out", folder / "out", "--vocab-size", 270, "--dedup", "exact"]
    arguments += ["--max-errors", 1, "--shard-tokens", 5000, "--workers", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MIN_TASK_BYTES", 50_000)
        assert run_command("preprocess", lambda: main([str(a) for a in arguments])) == 0
    counts = json.loads((folder / "out" / "tasks.json").read_text())["train_shards"]
    assert len(counts) > 3
    assert max(counts) > 2
    return folder


@pytest.fixture
def damaged(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to be damaged; the source stays where it was."""
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 50_000)
    shutil.copytree(data / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("names", [["train-00004.h5"], ["train-00000.h5", "val-00000.h5"]])
def test_damaged_and_missing_shards_come_back_as_they_were(names: list[str], damaged: Path) -> None:
    before = {path.name: path.read_bytes() for path in damaged.iterdir()}
    (damaged / names[0]).unlink()
    for name in names[1:]:
        raw = bytearray(before[name])
        raw[-100] ^= 1
        (damaged / name).write_bytes(raw)
    assert {problem.file for problem in verify_folder(damaged)} == {*names}
    repair(damaged, read_manifest(damaged), names, workers=1)
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before


def test_the_command(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (damaged / "train-00002.h5").read_bytes()
    (damaged / "train-00002.h5").write_bytes(before[:-1])
    assert run_command("dataset", lambda: dataset.main(["repair", str(damaged), "--workers", "1"])) == 0
    said = capsys.readouterr().out
    assert "train-00002.h5: bad: " in said
    assert said.endswith(f"{damaged}: all intact\n")
    assert (damaged / "train-00002.h5").read_bytes() == before
    (damaged / "tokenizer.json").write_text("{}")
    assert run_command("dataset", lambda: dataset.main(["repair", str(damaged), "--workers", "1"])) == 2


def test_a_source_that_was_only_touched_will_do(data: Path, damaged: Path) -> None:
    before = (damaged / "train-00001.h5").read_bytes()
    (damaged / "train-00001.h5").unlink()
    (data / "a.jsonl").touch()
    repair(damaged, read_manifest(damaged), ["train-00001.h5"], workers=1)
    assert (damaged / "train-00001.h5").read_bytes() == before


def test_repair_encodes_as_preprocess_did(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer_stage, "FAST_FROM_BYTES", 1)
    record = json.loads((damaged / "preprocess.json").read_text())
    out = damaged.parent / "fast"
    arguments = [record["sources"]["inputs"][0], "--out", out, "--vocab-size", 270, "--dedup", "exact"]
    arguments += ["--max-errors", 1, "--shard-tokens", 5000, "--workers", 1]
    assert run_command("preprocess", lambda: main([str(a) for a in arguments])) == 0
    choice = {"encoder": PACKAGE, "version": version()}
    assert json.loads((out / "seconds.json").read_text())["encoder"] == choice
    before, used = (out / "train-00001.h5").read_bytes(), []
    follow = fast.follow
    monkeypatch.setattr(fast, "follow", lambda own, chosen: used.append(chosen) or follow(own, chosen))
    for installed in (version(), "0.0.1"):
        monkeypatch.setattr(fast, "version", lambda installed=installed: installed)
        (out / "train-00001.h5").unlink()
        repair(out, read_manifest(out), ["train-00001.h5"], workers=1)
        assert (out / "train-00001.h5").read_bytes() == before
    assert used == [choice, fast.REFERENCE]


def test_what_cannot_be_repaired(data: Path, damaged: Path) -> None:
    manifest = read_manifest(damaged)
    with pytest.raises(UserError, match=r"tokenizer\.json: is damaged; copy it"):
        repair(damaged, manifest, ["tokenizer.json"], workers=1)
    record = json.loads((damaged / "preprocess.json").read_text())
    (damaged / "preprocess.json").write_text(json.dumps({**record, "seed": 5}))
    with pytest.raises(UserError, match=r"comes out with other bytes \(other tokens\)"):
        repair(damaged, manifest, ["train-00000.h5"], workers=1)
    (damaged / "preprocess.json").write_text(
        json.dumps({**record, "inputs": {**record["inputs"], "bytes": 1}})
    )
    with pytest.raises(UserError, match=r"its source has changed since \(inputs: 1 files of \d+ bytes"):
        repair(damaged, manifest, ["train-00000.h5"], workers=1)
    (damaged / "preprocess.json").write_text(json.dumps({"format": "hvdlm-preprocess"}))
    with pytest.raises(UserError, match=r"preprocess\.json: is damaged"):
        repair(damaged, manifest, ["train-00000.h5"], workers=1)
    for key, value in (("shard_tokens", "abc"), ("sources", {"inputs": [1], "val": []}), ("min_chars", [])):
        (damaged / "preprocess.json").write_text(json.dumps({**record, key: value}))
        with pytest.raises(UserError, match=r"preprocess\.json: is damaged"):
            repair(damaged, manifest, ["train-00000.h5"], workers=1)
    (damaged / "preprocess.json").write_text(json.dumps(record))
    (damaged / "train-00001.h5").rename(damaged / "kept")
    (damaged / "train-00001.h5").mkdir()
    with pytest.raises(UserError, match=r"train-00001\.h5: cannot be written: Is a directory"):
        repair(damaged, manifest, ["train-00001.h5"], workers=1)
    (damaged / "train-00001.h5").rmdir()
    (damaged / "kept").rename(damaged / "train-00001.h5")
    tasks = json.loads((damaged / "tasks.json").read_text())
    for content in ("[]", '{"train_shards": 3}', '{"train_shards": [1, -1]}', '{"train_shards": ["1"]}'):
        (damaged / "tasks.json").write_text(content)
        with pytest.raises(UserError, match=r"tasks\.json: is damaged, or of another source \(tells of 0 "):
            repair(damaged, manifest, ["train-00000.h5"], workers=1)
    (damaged / "tasks.json").write_text(json.dumps({"train_shards": [*tasks["train_shards"], 0]}))
    with pytest.raises(UserError, match=r"tasks\.json: is damaged, or of another source"):
        repair(damaged, manifest, ["train-00000.h5"], workers=1)
    (damaged / "preprocess.json").unlink()
    with pytest.raises(UserError, match="does not say what it was made from"):
        repair(damaged, manifest, ["train-00000.h5"], workers=1)
    assert not [*damaged.glob(".tmp-*")]
    assert verify_folder(damaged) == []


def test_a_pattern_in_a_folder_whose_name_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "br[1]"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"text {i}")
    monkeypatch.chdir(folder)
    arguments = [
        "[0-9]*.txt",
        "--out",
        "out",
        "--tokenizer",
        "byte",
        "--val-fraction",
        "0.2",
        "--workers",
        "1",
    ]
    assert run_command("preprocess", lambda: main(arguments)) == 0
    before = (folder / "out" / "train-00000.h5").read_bytes()
    (folder / "out" / "train-00000.h5").unlink()
    monkeypatch.chdir(tmp_path)
    repair(folder / "out", read_manifest(folder / "out"), ["train-00000.h5"], workers=1)
    assert (folder / "out" / "train-00000.h5").read_bytes() == before
