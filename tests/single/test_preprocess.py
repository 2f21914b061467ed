"""The command as its users run it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import h5py
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdlm.config import run_command
from hvdlm.corpus import demo, existing, hold, install, plan, stdlib, tokenizer_stage
from hvdlm.corpus.crew import alone
from hvdlm.data.manifest import read_manifest
from hvdlm.dataset import __main__ as dataset
from hvdlm.preprocess.__main__ import main
from hvdlm.text import TOKENIZERS
from hvdlm.text.gigatoken_encoder import GigatokenEncoder
from hvdlm.text.tokenizer import from_library, load

SPECIAL = [
    "\x00nul\x00",
    "cr\r\nlf\r\n",
    "👩‍👩‍👧 e\u0301 人人生而自由",
    "<|endoftext|> <EOS>",
    " \n",
    "y" * 100_000,
]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small input makes a plan of several tasks."""
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 1 << 17)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte in two kinds of files, with nasty, equal, empty and long documents."""
    folder = tmp_path_factory.mktemp("corpus")
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghij", k=source.randrange(1, 8))) for _ in range(300)]
    texts = [" ".join(source.choices(words, k=source.randrange(1, 200))) for _ in range(800)]
    texts[100:100] = [*SPECIAL, "", "", *["twin"] * 20]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(rows))
    for i, text in enumerate(texts[:50]):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return folder


def texts_of(corpus: Path) -> list[str]:
    rows = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().split("\n") if line]
    return [*rows, *(path.read_bytes().decode() for path in corpus.glob("*.txt"))]


def run(*args: str | Path) -> int:
    return run_command("preprocess", lambda: main([str(arg) for arg in args]))


def decoded(folder: Path, split: str) -> list[str]:
    """Every document of a data set, read with nothing but HDF5 and the tokenizer."""
    tokenizer = load(folder / "tokenizer.json")
    found = []
    for path in sorted(folder.glob(f"{split}-*.h5")):
        with h5py.File(path) as file:
            tokens, offsets = file["tokens"][:], file["doc_offsets"][:].tolist()
        for start, end in pairwise(offsets):
            assert tokens[end - 1] == tokenizer.eos_id
            assert tokenizer.eos_id not in tokens[start : end - 1]
            found.append(tokenizer.decode(tokens[start : end - 1]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the one that says how long it took."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "seconds.json"}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_nothing_is_lost_and_twins_stay_together(tokenizer: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ["--vocab-size", "400"] if tokenizer == "bpe" else []
    assert (
        run(corpus, "--out", out, "--tokenizer", tokenizer, *size, "--workers", 1, "--val-fraction", 0.1) == 0
    )
    train, val = decoded(out, "train"), decoded(out, "val")
    expected = sorted(text for text in texts_of(corpus) if text)
    assert sorted(train + val) == expected
    assert not {*train} & {*val}
    assert 0.05 < len(val) / len(expected) < 0.15
    manifest = read_manifest(out)
    assert manifest.tokenizer.sha256 == load(out / "tokenizer.json").fingerprint
    for split, texts in (("train", train), ("val", val)):
        assert manifest.text_bytes(split) == sum(len(text.encode()) for text in texts)
        assert manifest.documents(split) == len(texts)


def test_workers_do_not_show_and_the_seed_does(corpus: Path, tmp_path: Path) -> None:
    for name, workers, seed in [("one", 1, 0), ("three", 3, 0), ("other", 1, 1)]:
        arguments = ["--vocab-size", 300, "--workers", workers, "--seed", seed, "--shard-tokens", 30_000]
        assert run(corpus, "--out", tmp_path / name, *arguments) == 0
    one, three, other = (contents(tmp_path / name) for name in ("one", "three", "other"))
    assert one == three
    assert len([name for name in one if name.startswith("train")]) > 4
    assert all(shard.tokens <= 30_000 for shard in read_manifest(tmp_path / "one").shards)
    assert one["train-00000.h5"] != other["train-00000.h5"]
    assert sorted(decoded(tmp_path / "one", "val")) == sorted(decoded(tmp_path / "other", "val"))


def test_the_fast_encoder_does_not_show(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--vocab-size", 300, "--workers", 1]
    assert run(corpus, "--out", tmp_path / "reference", *arguments) == 0
    used: list[str] = []
    encode = GigatokenEncoder.encode
    monkeypatch.setattr(
        GigatokenEncoder, "encode", lambda self, text: used.append(text) or encode(self, text)
    )
    monkeypatch.setattr(tokenizer_stage, "FAST_FROM_BYTES", 0)
    assert run(corpus, "--out", tmp_path / "fast", *arguments) == 0
    assert len(used) > 800
    assert contents(tmp_path / "fast") == contents(tmp_path / "reference")
    used.clear()
    assert run(corpus, "--out", tmp_path / "asked", *arguments, "--encoder", "reference") == 0
    assert not used
    assert contents(tmp_path / "asked") == contents(tmp_path / "reference")
    monkeypatch.setattr(GigatokenEncoder, "encode", lambda self, text: encode(self, f"{text}x"))
    assert run(corpus, "--out", tmp_path / "wrong", *arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "not the fast encoder" in line]
    assert len(said) == 1
    assert contents(tmp_path / "wrong") == contents(tmp_path / "reference")


def test_a_document_longer_than_a_shard_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 10)
    out = tmp_path / "out"
    arguments = ["--val", tmp_path / "b.txt", "--tokenizer", "byte", "--shard-tokens", 101, "--workers", 1]
    assert run(tmp_path / "a.txt", *arguments, "--out", out) == 0
    assert decoded(out, "train") == ["a" * 100] * 10
    assert decoded(out, "val") == ["b" * 10]
    assert read_manifest(out).text_bytes("train") == 1000


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """Which costs each worker 200 MB and a second."""
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    (tmp_path / "val.txt").write_text("other text\n")
    arguments = [str(tmp_path / "a.txt"), "--val", str(tmp_path / "val.txt"), "--out", str(tmp_path / "out")]
    code = (
        "import sys; from hvdlm.preprocess.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ', '.join({'torch', 'horovod'} & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code, *arguments, "--tokenizer", "byte", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def peak_mib(*arguments: str) -> int:
    """Peak of resident memory of the command, in a process of its own.

    Not getrusage: its peak begins with the memory of the process that started this one.
    """
    code = (
        "import sys; from hvdlm.preprocess.__main__ import main; code = main(sys.argv[1:]); "
        "[print(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')]; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) // 1024


@pytest.mark.long
@pytest.mark.parametrize("first", ["", "👩"], ids=["ascii", "emoji"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_longest_document_takes_less_than_a_gibibyte(kind: str, first: str, tmp_path: Path) -> None:
    """With a BPE trained on it; its words are random, so there are more of them than in real text.

    One emoji makes a string of it four times as large.
    """
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, plan.MAX_DOCUMENT_BYTES - 20, dtype=np.uint8)
    letters[rng.random(len(letters), np.float32) < 1 / 6] = ord(" ")
    text, path = first + letters.tobytes().decode(), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(text if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (tmp_path / "val.txt").write_text("short")
    arguments = [str(path), "--val", str(tmp_path / "val.txt"), "--out", str(tmp_path / "out")]
    peak = peak_mib(*arguments, "--tokenizer", "bpe", "--vocab-size", "8192", "--workers", "1")
    print(f"{kind}{first}: {peak} MiB")
    assert peak < 1024
    assert read_manifest(tmp_path / "out").text_bytes("train") == len(text.encode())


def test_a_line_of_50_mb_in_bounded_memory(tmp_path: Path) -> None:
    """Chinese, emoji and a NUL in one line; the process is a new one, because its peak memory counts."""
    text = "人人生而自由👩\u200d👩\u200d👧 e\u0301\x00 " * (50_000_000 // 50)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 40_000_000
    (tmp_path / "val.txt").write_text("short")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "a.jsonl"), "--val", str(tmp_path / "val.txt"), "--out", str(out)]
    assert peak_mib(*arguments, "--tokenizer", "byte", "--workers", "1") < 350
    with h5py.File(out / "train-00000.h5") as file:
        assert file["tokens"].shape == (len(text.encode()) + 1,)
        assert bytes(file["tokens"][:100].astype(np.uint8)) == text.encode()[:100]


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_huge_page_of_parquet_in_bounded_memory(dictionary: bool, tmp_path: Path) -> None:
    """pyarrow would hold it two to four times."""
    texts = ["abcdefghi " * 6_000_000, "jklmnopqr " * 6_000_000, "stuvwxyz. " * 6_000_000]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=dictionary)
    (tmp_path / "val.txt").write_text("short")
    inputs = [str(tmp_path / "a.parquet"), "--val", str(tmp_path / "val.txt")]
    out = tmp_path / "out"
    assert peak_mib(*inputs, "--out", str(out), "--tokenizer", "byte", "--workers", "1") < 350
    assert read_manifest(out).text_bytes("train") == 180_000_000


@pytest.mark.parametrize("last", ["[]", "NaN", '"\\ud800"'])
def test_a_line_of_structure_in_bounded_memory(last: str, tmp_path: Path) -> None:
    """As Python's objects its lists would take two gigabytes, also where no strict parser reads it."""
    line = '{"lists": [' + "[]," * 20_000_000 + f'{last}], "text": "a few words", "more": 1}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "val.txt").write_text("short")
    arguments = [
        str(tmp_path / "a.jsonl"),
        "--val",
        str(tmp_path / "val.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert peak_mib(*arguments, "--tokenizer", "byte", "--workers", "1") < 350
    assert decoded(tmp_path / "out", "train") == ["a few words"]


def test_word_tokenizer_and_a_given_one(corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, "--out", tmp_path / "w", "--tokenizer", "word", "--workers", 1) == 0
    given = tmp_path / "w" / "tokenizer.json"
    (tmp_path / "val.txt").write_text("abc unseen")
    arguments = ["--val", tmp_path / "val.txt", "--tokenizer", given, "--workers", 1, "--document", "line"]
    assert run(corpus / "000.txt", "--out", tmp_path / "g", *arguments) == 0
    assert (tmp_path / "g" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert decoded(tmp_path / "g", "val")[0].endswith("<UNK>")
    assert read_manifest(tmp_path / "g").tokenizer.eos_id == 3


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    library = TOKENIZERS["byte"]([], 0)
    library.add_tokens([f"tok{i}" for i in range(70_000)])
    (tmp_path / "t.json").write_bytes(from_library(library).json_bytes)
    (tmp_path / "a.txt").write_text("atok69999z\nb\nc\n")
    arguments = [
        "--tokenizer",
        tmp_path / "t.json",
        "--document",
        "line",
        "--val-fraction",
        0.5,
        "--workers",
        1,
    ]
    assert run(tmp_path / "a.txt", "--out", tmp_path / "out", *arguments) == 0
    with h5py.File(tmp_path / "out" / "train-00000.h5") as file:
        assert file["tokens"].dtype == np.dtype("<u4")
    documents = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    assert sorted(documents) == ["atok69999z", "b", "c"]


def test_twice_is_already_there_and_a_difference_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some\nlines\nof\ntext\n" * 50)
    base = [
        source,
        "--out",
        out,
        "--document",
        "line",
        "--val-fraction",
        0.4,
        "--workers",
        1,
        "--vocab-size",
        260,
    ]
    assert run(*base) == 0
    before = contents(out)
    assert run(*base[:-4], "--workers", 2, *base[-2:]) == 0
    assert "is already there, made from the same inputs" in capsys.readouterr().out
    assert run(*base, "--seed", 4) == 2
    assert f"{out}: holds a data set made otherwise (seed 0 then, 4 now)" in capsys.readouterr().err
    os.utime(source, ns=(5, 5))
    assert run(*base) == 2
    assert "(inputs files=1" in capsys.readouterr().err
    assert contents(out) == before
    assert run(*base, "--seed", 4, "--force") == 0
    assert contents(out) != before
    (out / "train-00000.h5").write_bytes(b"")
    assert run(*base, "--seed", 4) == 2
    assert "train-00000.h5: missing or damaged" in capsys.readouterr().err


def test_a_failed_force_keeps_the_old_data_set(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    good.write_text("some\nlines\nof\ntext\n" * 50)
    bad.write_bytes(b"\xff")
    base = ["--out", out, "--document", "line", "--val-fraction", 0.4, "--workers", 1, "--tokenizer", "byte"]
    assert run(good, *base) == 0
    before = contents(out)
    assert run(bad, *base, "--force") == 2
    assert contents(out) == before


def test_folders_that_hold_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some\nlines\nof\ntext\n" * 50)
    base = [
        source,
        "--document",
        "line",
        "--val-fraction",
        0.4,
        "--workers",
        1,
        "--tokenizer",
        "byte",
        "--out",
    ]
    for name, message in [
        ("manifest.json", "of unknown origin"),
        ("train-00000.h5", "files of unknown origin that would be replaced (train-00000.h5)"),
        ("rejects.jsonl", "files of unknown origin that would be replaced (rejects.jsonl)"),
        ("stats.json", "files of unknown origin that would be replaced (stats.json)"),
        ("tokenizer.json", "files of unknown origin that would be replaced (tokenizer.json)"),
    ]:
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        assert run(*base, out) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name]
    out = tmp_path / "notes"
    out.mkdir()
    (out / "README").write_text("mine")
    assert run(*base, out) == 0
    assert (out / "README").read_text() == "mine"
    assert run(*base, source / "x") == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err


def test_an_empty_split_names_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("only one document")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    out = tmp_path / "out"
    assert run(tmp_path / "a.txt", "--out", out, "--tokenizer", "byte", "--workers", 1) == 2
    assert "a split is empty: train has 1 documents, val has 0;" in capsys.readouterr().err
    assert run(tmp_path / "empty.jsonl", "--out", out, "--tokenizer", "byte", "--workers", 1) == 2
    assert "no documents (1 empty), so" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "7"], "--vocab-size 7: bpe needs 257"),
        (["--tokenizer", "nope"], "--tokenizer nope: No such file or directory; needed byte"),
        (["--val-fraction", "0"], "--val-fraction 0.0: needed more than 0"),
        (["--val", "x", "--val-fraction", "0.1"], "exclude each other"),
        (["--shard-tokens", "2"], "--shard-tokens 2: needed 16 to"),
        (["--eos", "</s>"], "--eos </s>: is for a tokenizer.json"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert run(tmp_path / "a.txt", "--out", tmp_path / "out", "--workers", 1, *arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("hvdlm preprocess: error: ")
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_out_is_needed_for_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a.txt") == 2
    assert "--out DIR is missing" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "a.txt"), Path(name, "out")
        source.write_text("a\nb\nc\nd\n")
        out.mkdir(0o555)
        Path(name).chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            assert run(source, "--out", out, "--workers", 1) == 2
        finally:
            os.seteuid(user)
    assert f"{out}: cannot be written: Permission denied; choose another" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\nd\n")
    with hold.claimed(tmp_path / "out", existing.WORK_NAME, wait=False, crew=alone()):
        assert run(tmp_path / "a.txt", "--out", tmp_path / "out") == 2
    assert "another program writes there" in capsys.readouterr().err


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    workers: int, tiny_disk: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokenizer", "byte", "--workers", workers]
    assert run(corpus, "--out", tiny_disk / "out", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tiny_disk) in error
    assert "No space left on device" in error
    subprocess.run(["mount", "-o", "remount,size=100m", str(tiny_disk)], check=True)
    assert run(corpus, "--out", tiny_disk / "out", *arguments) == 0
    assert run(corpus, "--out", tmp_path / "fresh", *arguments) == 0
    assert contents(tiny_disk / "out") == contents(tmp_path / "fresh")


def start(corpus: Path, out: Path, **options: Any) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """A run of the command that has its workers at work."""
    command = [
        sys.executable,
        "-m",
        "hvdlm.preprocess",
        str(corpus),
        "--out",
        str(out),
        "--tokenizer",
        "word",
    ]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, **options)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        # A process that is just starting or ending has no command line to look at.
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if len(workers) == 2:
                return process, workers
        time.sleep(0.01)
    raise AssertionError("no workers came up")


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


@pytest.fixture(scope="module")
def large_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(20):
        shutil.copy(corpus / "a.jsonl", folder / f"{i}.jsonl")
    library = TOKENIZERS["bpe"](["some text"], 260)
    (folder / "tokenizer.json").write_bytes(from_library(library).json_bytes)
    return folder


def test_a_killed_worker_is_one_line(large_corpus: Path, tmp_path: Path) -> None:
    process, workers = start(large_corpus, tmp_path / "out")
    workers[0].kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process died of signal SIGKILL in its task" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert gone(workers)


def test_a_killed_run_leaves_no_manifest_and_does_not_go_on_as_another(
    large_corpus: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process, workers = start(large_corpus, out)
    process.kill()
    process.communicate(timeout=30)
    assert gone(workers)
    assert [path.name for path in out.iterdir()] == [existing.WORK_NAME]
    arguments = [corpus, "--out", out, "--tokenizer", "byte", "--workers", 1]
    encoded = out / existing.WORK_NAME / "done" / "encode"
    encoded.mkdir(parents=True, exist_ok=True)
    (encoded / "00000.json").write_text("{}")
    before = sorted(path.name for path in (out / existing.WORK_NAME).iterdir())
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "holds unfinished work, begun otherwise (inputs files=20 bytes=" in error
    assert "; tokenizer word then, byte now); put that back to go on" in error
    assert sorted(path.name for path in (out / existing.WORK_NAME).iterdir()) == before
    # As if it had been killed while it moved its files into place.
    (out / existing.RECORD_NAME).write_text("{}")
    (out / "train-00099.h5").write_text("half")
    assert run(*arguments, "--force") == 0
    assert run(*arguments[:2], tmp_path / "fresh", *arguments[3:]) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_run_that_was_killed_while_it_moved_its_files_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tokenizer", "byte", "--workers", 1, "--shard-tokens", 20_000]
    assert run(corpus, "--out", tmp_path / "fresh", *arguments) == 0
    out, moved = tmp_path / "out", 0
    move = install._move

    def move_some(*values: Any) -> Any:
        nonlocal moved
        moved += 1
        if moved == 8:
            raise KeyboardInterrupt
        return move(*values)

    monkeypatch.setattr(install, "_move", move_some)
    assert run(corpus, "--out", out, *arguments) == 130
    assert len([*out.glob("train-*.h5")]) == 7
    assert not (out / "manifest.json").exists()
    assert run(corpus, "--out", out, *arguments) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_a_broken_file_system_lost_is_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokenizer", "byte", "--workers", 1, "--shard-tokens", 20_000]
    assert run(corpus, "--out", tmp_path / "fresh", *arguments) == 0
    out, losses = tmp_path / "out", 0
    work = out / existing.WORK_NAME

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, "_move", interrupt)
        assert run(corpus, "--out", out, *arguments) == 130
    val = next(path for path in sorted(work.glob("val-*.tokens")) if path.stat().st_size)
    os.truncate(val, val.stat().st_size - 2)
    val.with_suffix(".bytes").unlink()
    shard = sorted(work.glob("train-*.h5"))[-1]
    os.truncate(shard, 100)
    while run(corpus, "--out", out, *arguments) == 1:
        assert "files of 2 task(s), the first task " in capsys.readouterr().err
        losses += 1
    assert losses == 1
    assert contents(out) == contents(tmp_path / "fresh")


def test_ctrl_c_stops_everything_at_once(large_corpus: Path, tmp_path: Path) -> None:
    process, workers = start(large_corpus, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert gone(workers)


def test_without_arguments_it_shards_the_demo_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = stdlib.find()[::10]
    monkeypatch.setattr(stdlib, "find", lambda: some)
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    assert "next       horovodrun -np 2 python -m hvdlm.train\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "data" / "demo")
    assert manifest.tokenizer.vocab_size == stdlib.VOCAB_SIZE
    assert manifest.documents("train") + manifest.documents("val") == len(some)
    assert demo.prepare(tmp_path / "data" / "demo") == manifest


def test_of_a_large_input_every_task_trains_the_tokenizer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for limit in (1 << 30, 1_500):
        monkeypatch.setattr("hvdlm.corpus.training_text.MAX_BYTES", limit)
        out = tmp_path / f"{limit}"
        assert run(corpus, "--out", out, "--tokenizer", "word", "--workers", 1) == 0
        sizes.append(read_manifest(out).tokenizer.vocab_size)
    assert 20 < sizes[1] < sizes[0] - 20


def test_a_data_set_inside_its_input_is_found_again_and_repaired(corpus: Path, tmp_path: Path) -> None:
    """What it wrote itself, its rejects, is no input."""
    shutil.copytree(corpus, tmp_path / "in")
    out = tmp_path / "in" / "out"
    arguments = [tmp_path / "in", "--out", out, "--tokenizer", "byte", "--min-chars", 5, "--workers", 1]
    assert run(*arguments) == 0
    assert (out / "rejects.jsonl").exists()
    before = contents(out)
    assert run(*arguments) == 0
    (out / "train-00000.h5").unlink()
    assert run_command("dataset", lambda: dataset.main(["repair", str(out)])) == 0
    assert contents(out) == before


def test_what_could_not_be_planned_is_not_in_the_way_of_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"body": [f"row {i}" for i in range(60)]}), tmp_path / "b.parquet")
    arguments = [tmp_path / "b.parquet", "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", 1]
    assert run(*arguments) == 2
    assert "choose with --field one of: body" in capsys.readouterr().err
    assert run(*arguments, "--field", "body", "--val-fraction", 0.2) == 0


def test_work_begun_otherwise_of_which_nothing_is_done_is_replaced(corpus: Path, tmp_path: Path) -> None:
    """Several ranks cannot take it away: the others may be looking at it."""
    work = tmp_path / "out" / existing.WORK_NAME
    work.mkdir(parents=True)
    (work / existing.RECORD_NAME).write_text(json.dumps({"invalid": "error"}))
    assert run(corpus, "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", 1) == 0


def test_a_start_with_nothing_to_do_leaves_the_work_of_another_alone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [corpus, "--out", out, "--tokenizer", "byte", "--workers", 1]
    assert run(*arguments) == 0
    result = out / existing.WORK_NAME / "done" / "encode" / "00000.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    (out / existing.WORK_NAME / existing.RECORD_NAME).write_text(json.dumps({"seed": 1}))
    assert run(*arguments) == 0
    assert result.exists()
    assert run(*arguments, "--seed", 2) == 2


def test_resharding_with_its_own_tokenizer_goes_on_after_a_kill(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(corpus, "--out", out, "--tokenizer", "byte", "--workers", 1) == 0
    arguments = [corpus, "--out", out, "--tokenizer", out / "tokenizer.json", "--workers", 1, "--seed", 5]
    with monkeypatch.context() as patch:
        patch.setattr(existing, "write_record", Mock(side_effect=[None, KeyboardInterrupt]))
        assert run(*arguments, "--force") == 130
    assert not (out / "manifest.json").exists()
    assert run(*arguments, "--force") == 0
    (out / ".tmp-0123456789ab-stats.json").write_text("half")
    assert run(*arguments, "--force", "--seed", 6) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_group_while_workers_start_is_the_parents(
    number: signal.Signals, large_corpus: Path, tmp_path: Path
) -> None:
    process, _ = start(large_corpus, tmp_path / "out", start_new_session=True)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 75), errors
    assert "Traceback" not in errors
    assert "died" not in errors


def test_what_cannot_be_shown_or_written_to_stdout(corpus: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m hvdlm.preprocess {corpus} --tokenizer byte --workers 1 --out {tmp_path}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(f"{command}/übung", shell=True, capture_output=True, text=True, env=env)
    assert (shown.returncode, shown.stderr.count("Traceback")) == (0, 0), shown.stderr
    assert "\\xfcbung" in shown.stdout
    closed = subprocess.run(f"{command}/closed >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr.count("Traceback")) == (0, 0), closed.stderr
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    full = subprocess.run(
        f"{command}/full >/dev/full", shell=True, stderr=subprocess.PIPE, text=True, env=env
    )
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert last == "hvdlm preprocess: error: standard output: cannot be written: No space left on device"


def test_one_line_whatever_the_data_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"a\nb": 1, "k" * 10_000: 2}) + "\n")
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", 1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"choose with --field one of: a\\nb, {'k' * 40}" in line
    assert len(line) < 400


def test_a_file_system_that_refuses_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """A limit of file size, say, where no disk is full."""
    command = (
        f"ulimit -f 100; {sys.executable} -m hvdlm.preprocess {corpus} --tokenizer byte --out {tmp_path}/o"
    )
    for workers in (1, 2):
        done = subprocess.run(
            ["bash", "-c", f"{command} --workers {workers}"], capture_output=True, text=True
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "cannot be written: File too large" in done.stderr.splitlines()[-1]
