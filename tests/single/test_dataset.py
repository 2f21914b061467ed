from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import flip_bit

from hvdlm.config import UserError
from hvdlm.data.entries import BLOCK_TOKENS
from hvdlm.data.manifest import Manifest, TokenizerInfo, write_manifest
from hvdlm.data.shards import write_shard
from hvdlm.dataset.__main__ import main
from hvdlm.dataset.progress import Progress
from hvdlm.text import TOKENIZERS
from hvdlm.text.tokenizer import from_library

TEXTS = {
    "train": ["The first.\nTwo lines.", "", "emoji 🦀 and NUL \0", "x" * (BLOCK_TOKENS + 5)],
    "val": ["held out"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A data set of bytes: two train shards, one of them with two blocks, and one val shard."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = from_library(TOKENIZERS["byte"]([], 0))
    (folder / "tokenizer.json").write_bytes(tokenizer.json_bytes)
    info = TokenizerInfo("tokenizer.json", tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
    entries = []
    for name, texts in (
        ("train-00000", TEXTS["train"][:2]),
        ("train-00001", TEXTS["train"][2:]),
        ("val-00000", TEXTS["val"]),
    ):
        documents = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
        offsets = np.cumsum([0] + [len(document) for document in documents])
        text_bytes = sum(len(text.encode()) for text in texts)
        entry = write_shard(
            folder / f"{name}.h5",
            np.concatenate(documents),
            offsets,
            split=name.split("-")[0],
            text_bytes=text_bytes,
            tokenizer=info,
        )
        entries.append(entry)
    return folder, write_manifest(folder, entries, tokenizer=info)


def test_verify_an_intact_data_set(data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(data[0])]) == 0
    assert "3 shards" in (out := capsys.readouterr().out)
    assert out.endswith(": all intact\n")


def test_verify_names_each_bad_shard_and_block_on_its_line(
    data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = data
    places = {"train-00001.h5": 2 * BLOCK_TOKENS, "val-00000.h5": 3}
    offsets = {entry.name: entry.extents.tokens.offset for entry in manifest.shards}
    for name, place in places.items():
        flip_bit(folder / name, offsets[name] + place)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, place in places.items():
        flip_bit(folder / name, offsets[name] + place)
    assert lines[0].startswith(f"{folder}/train-00001.h5: bad: block 1: tokens 1048576 to ")
    assert lines[1].startswith(f"{folder}/val-00000.h5: bad: block 0: tokens 0 to 8 ")
    assert lines[2].endswith(": 2 bad")
    assert len(lines) == 3


def test_inspect_shows_the_counts(data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(data[0])]) == 0
    out = capsys.readouterr().out
    assert data[1].fingerprint in out
    assert data[1].tokenizer.sha256 in out
    rows = [line.split() for line in out.splitlines()]
    assert ["val-00000.h5", "val", "<u2", "1", "9", "8"] in [row[:6] for row in rows]
    train_bytes = sum(len(text.encode()) for text in TEXTS["train"])
    assert ["2", "in", "all", "train", "4", f"{train_bytes + 4:,}", f"{train_bytes:,}"] in [
        row[:7] for row in rows
    ]


@pytest.mark.parametrize(
    ("split", "index"), [("train", 0), ("train", 1), ("train", 2), ("train", 3), ("val", 0)]
)
def test_inspect_prints_a_document_as_it_was(
    data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str], split: str, index: int
) -> None:
    assert main(["inspect", str(data[0]), "--document", str(index), "--split", split]) == 0
    assert capsys.readouterr().out == TEXTS[split][index] + "\n"


def test_what_is_not_there_is_one_line(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder = str(data[0])
    for index in ("4", "-1"):
        with pytest.raises(UserError, match=rf"split 'train' has documents 0 to 3, not {index}"):
            main(["inspect", folder, "--document", index])
    with pytest.raises(UserError, match=r"no manifest\.json, so no data set"):
        main(["verify", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main(["inspect", folder, "--document", "one"])
    assert caught.value.code == 2


def test_inspect_refuses_another_tokenizer(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = data
    for entry in manifest.shards:
        (tmp_path / entry.name).symlink_to(folder / entry.name)
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        main(["inspect", str(tmp_path), "--document", "0"])
    word = from_library(TOKENIZERS["word"](["a b c"], 100))
    (tmp_path / "tokenizer.json").write_bytes(word.json_bytes)
    with pytest.raises(UserError, match="not the tokenizer that made the shards"):
        main(["inspect", str(tmp_path), "--document", "0"])


def run(*args: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hvdlm.dataset", *args]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_command_line(data: tuple[Path, Manifest], tmp_path: Path) -> None:
    """A terminal that knows only ASCII, a reader that goes away, and a folder that is not there."""
    folder = str(data[0])
    shown = run("inspect", folder, "--document", "2", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "emoji \\U0001f980 and" in shown.stdout
    pipe = f'"{sys.executable}" -m hvdlm.dataset inspect "{folder}" --document 3 | head -c 10'
    piped = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], capture_output=True, text=True)
    assert (piped.returncode, piped.stdout, piped.stderr) == (141, "x" * 10, "")
    missing = run("verify", str(tmp_path / "no"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("hvdlm dataset: error: ")
    assert missing.stderr.count("\n") == 1


def test_inspect_shows_ids_with_their_text(
    data: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(data[0]), "--document", "0", "--split", "val", "--ids"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert rows == [[str(ord(c)), repr(c)] for c in TEXTS["val"][0]] + [["256", "'<|endoftext|>'"]]
    with pytest.raises(UserError, match="add --document"):
        main(["inspect", str(data[0]), "--ids"])


def test_one_process_touches_neither_torch_nor_mpi(data: tuple[Path, Manifest]) -> None:
    """So `verify` starts in a moment, also on a login node where MPI aborts."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mpi4py'] = sys.modules['horovod'] = None; "
        f"from hvdlm.dataset.__main__ import main; sys.exit(main(['verify', {str(data[0])!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_batch_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("verify", 4_000_000, line_every_s=0.0) as progress:
        progress(1_000_000)
        progress(3_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" MB,")[0] for line in lines] == ["verify: 1.0 of 4.0", "verify: 4.0 of 4.0"]
    assert lines[1].endswith(" MB/s, 0 s left")
    with Progress("verify", 4_000_000) as progress:
        progress(1_000_000)
    assert capsys.readouterr().err == ""
