import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdlm.config import UserError
from hvdlm.corpus import stdlib
from hvdlm.corpus.plan import Piece
from hvdlm.corpus.readers import ReadOptions, read_documents
from hvdlm.corpus.sources import digest, find_inputs, kind_of


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def names(folder: Path, *inputs: str) -> list[str]:
    return [
        os.path.relpath(file.path, folder) for file in find_inputs([str(folder / text) for text in inputs])
    ]


def test_folders_are_searched_and_sorted(tmp_path: Path) -> None:
    write(
        tmp_path, "b.txt", "a/z.py", "a/b.jsonl", "c.parquet", "a/.hidden/x.txt", ".y.txt", "d.csv", "e.json"
    )
    (tmp_path / "empty.txt").touch()
    assert names(tmp_path, ".") == ["a/b.jsonl", "a/z.py", "b.txt", "c.parquet"]


def test_globs_files_and_folders_together_give_each_file_once(tmp_path: Path) -> None:
    write(tmp_path, "a/1.txt", "a/2.txt", "b/3.txt", "b/c/4.txt", "b/x.log")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a/1.txt")
    assert names(tmp_path, "b/**", "a/2.txt", "a", "link.txt") == [
        "a/1.txt",
        "a/2.txt",
        "b/3.txt",
        "b/c/4.txt",
    ]
    assert names(tmp_path, "*/[13].txt") == ["a/1.txt", "b/3.txt"]


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    write(tmp_path, "data/1.txt", "elsewhere/2.txt", "elsewhere/deep/3.txt")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path, "data") == ["data/1.txt", "elsewhere/2.txt", "elsewhere/deep/3.txt"]


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    for text in ("lorem ipsum " * 60, f"{tmp_path}/a.txt/b.txt"):
        with pytest.raises(UserError, match=r"(File name too long|Not a directory); check the path$") as e:
            find_inputs([text])
        assert e.value.exit_code == 2


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    write(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("A.TXT", "text"),
        ("x.py", "text"),
        ("x.jsonl.gz", "jsonl.gz"),
        ("x.jsonl.zst", "jsonl.zst"),
        ("x.gz", None),
    ],
)
def test_kind_follows_the_suffix(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_is_named_must_be_usable(tmp_path: Path) -> None:
    write(tmp_path, "x.csv", "folder/y.csv")
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in [
        ("none.txt", "not found"),
        ("x.csv", "unknown kind of file; needed .txt"),
        ("empty.txt", "empty file"),
        ("pipe.txt", "a device or a pipe"),
        ("folder", "holds no input"),
        ("*.nothing", "holds no input"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            find_inputs([str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root reads every folder, so it has to be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_folder_that_cannot_be_read_is_named(nobody: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "a.txt", "closed/b.txt")
        (folder / "a.txt").chmod(0)
        (folder / "closed").chmod(0)
        try:
            with pytest.raises(UserError, match=r"closed: permission denied"):
                find_inputs([name])
            piece = Piece(str(folder / "a.txt"), "text", 0, 3, 3)
            with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
                list(read_documents(piece, ReadOptions(), folder))
        finally:
            (folder / "closed").chmod(0o700)


def test_digest_follows_paths_sizes_and_times(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt")
    before = digest(find_inputs([str(tmp_path)]))
    assert digest(find_inputs([str(tmp_path)])) == before
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    assert digest(find_inputs([str(tmp_path)])) != before


def test_demo_corpus_is_the_standard_library_alone() -> None:
    files = stdlib.find()
    paths = [Path(file.path) for file in files]
    assert len(files) > 300
    assert any(path.name == "argparse.py" for path in paths)
    assert not any(stdlib.LEFT_OUT & {*path.parts[-3:]} for path in paths)
    assert files == stdlib.find()
    for path in paths[::50]:
        path.read_bytes().decode()
