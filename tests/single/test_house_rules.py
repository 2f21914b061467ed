"""The house rules that a program can check (docs/architecture.md; import layers: setup.cfg)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "hvdlm").rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools"}
BASES_THAT_MAKE_NO_FAMILY = {
    "OrderedDict",
    "Exception",
    "UserError",
    "ValueError",
    "nn.Module",
    "torch.autograd.Function",
    "ABC",
    "Protocol",
    "BaseHTTPRequestHandler",
    "ThreadingHTTPServer",
    "NamedTuple",
} | {"ArgumentParser"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[FUNCTION]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, FUNCTION))


def module_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_a_module_fits_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_a_function_fits_a_screen(path: Path) -> None:
    for function in functions(path):
        body = function.end_lineno - function.body[0].lineno + 1  # type: ignore[operator]
        docstring = ast.get_docstring(function)
        lines = body - (len(docstring.splitlines()) + 1 if docstring else 0)
        assert lines <= 45, f"{function.name}: {lines} lines"
        args = function.args
        count = len([a for a in args.args if a.arg not in ("self", "cls")]) + len(args.kwonlyargs)
        assert count <= 6 or function.name == "__init__", f"{function.name}: {count} parameters"


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_a_class_is_abstract_or_final(path: Path) -> None:
    """Nobody inherits from a class of this project but from Strategy and from its errors."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).partition("[")[0] for base in node.bases}
            assert bases <= BASES_THAT_MAKE_NO_FAMILY | {"Strategy", "Generic", "MalformedError"}, node.name


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_no_module_variable_is_rebound(path: Path) -> None:
    """No global state: what a function needs is passed in."""
    assert not [n for n in ast.walk(tree(path)) if isinstance(n, ast.Global)]


def test_what_is_at_the_top_is_a_command_or_a_part() -> None:
    for path in (ROOT / "hvdlm").glob("*.py"):
        if path.name != "__init__.py":
            assert 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"), path.name
    assert not BANNED_NAMES & {p.stem for p in MODULES}


def test_importing_does_nothing(tmp_path: Path) -> None:
    """Every module is imported in one process: no file, thread, signal handler or MPI is left behind."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in MODULES
        if p.stem not in ("__init__", "__main__")
    ]
    code = (
        "import importlib, signal, sys, threading\n"
        "before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]\n"
        "own = [t.name for t in threading.enumerate() if t is not threading.main_thread()]\n"
        "assert not own, own\n"
        "assert 'mpi4py.MPI' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_project_speaks_of_itself_alone() -> None:
    # Uncommitted files too: what is only seen after the commit is seen too late.
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    assert "README.md" in names
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        for word in ("TO" + "DO", "FIX" + "ME", "/ro" + "ot/", "/wo" + "rk/"):
            assert word not in text, f"{name}: {word}"
