"""What the documents say is true: commands are understood or run, files, links and knobs exist.

A command in a document is checked by the parser that will read it. Those from raw text to an export are run.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

import hvdlm.config
from hvdlm.config import RunConfig
from hvdlm.config.__main__ import main as config_main
from hvdlm.config.parse import keys, load_config, to_toml
from hvdlm.config.reference import to_markdown
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "slurm/sites/README.md")
DOCUMENTS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
RUNBOOK = ROOT / "docs" / "operations.md"
TAGS = {"sh", "text"}
HEADS = ("python -m ", "./install.sh", "make ", "mpirun ", "horovodrun ", "srun ", "sbatch ")
HOROVODRUN_ELASTIC = (
    *("--min-np", "--max-np", "--network-interface", "lo"),
    *("--host-discovery-script", "./hosts.sh"),
)
LAUNCHER_OPTIONS = {
    "mpirun": {"-np", *helpers.MPI_OPTIONS},
    "horovodrun": {"-np", "--gloo", *HOROVODRUN_ELASTIC},
    "srun": {"--mpi=pmix"},
}
"""What tests/parallel/ runs."""
SBATCH_OPTIONS = {"--nodes", "--time", "--array", "--job-name", "--partition"}
RUN_ELSEWHERE = {
    "touch data/runs/demo/STOP": "tests/parallel/test_train_stop.py::stop_by_file",
    "touch data/runs/demo/SAVE": "tests/parallel/test_train_keep.py::test_a_file_saves_and_the_run_goes_on",
    "kill -USR1 PID": "tests/parallel/test_train_stop.py::stop_by_usr1_to_mpirun",
}
HDF5_TOOLS = ("h5dump ", "python -c ")
"""Run by test_any_hdf5_tool_reads_a_shard."""
NOT_KNOBS = {"optim.count", "optim.scale", "train.py"}


def fences(text: str) -> list[tuple[str, str]]:
    """(tag, content) of each fenced block."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code, fenced blocks left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(path: Path) -> Iterator[str]:
    """Every line of shell, and every inline or indented code that is a whole command."""
    text = path.read_text()
    for tag, content in fences(text):
        if tag == "sh":
            yield from (line for line in content.splitlines() if line.strip())
    yield from (span for span in spans(text) if is_command(span))
    indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    yield from (line for line in indented if is_command(line) or line.startswith(HDF5_TOOLS))


def is_command(code: str) -> bool:
    launched = code.split(" ")[0] in LAUNCHER_OPTIONS
    return code.startswith(HEADS) and (not launched or "python" in code)


def all_commands() -> list[Any]:
    found = {(path.relative_to(ROOT), line) for path in DOCUMENTS for line in commands(path)}
    return [pytest.param(line, id=f"{path}: {line.split('  #')[0].strip()}") for path, line in sorted(found)]


class UnderstoodError(Exception):
    """A command's parser was content with its arguments."""


@pytest.mark.parametrize("line", all_commands())
def test_every_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] in LAUNCHER_OPTIONS:
        words = without_launcher(words)
    if words[0] == "sbatch":
        words = without_sbatch(words)
    command = " ".join(words)
    if words[0] == "./install.sh":
        check_install(words[1:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["python", "-m"]:
        monkeypatch.chdir(tmp_path)
        check_module(words[2], words[3:], monkeypatch)
    elif command in RUN_ELSEWHERE:
        file, _, function = RUN_ELSEWHERE[command].partition("::")
        assert f"def {function}(" in (ROOT / file).read_text()
    elif words[0] == "ruff":
        assert command in (ROOT / "Makefile").read_text().replace(" --check", "")
    elif words[0] == ".":
        assert words[1].endswith("/bin/activate") and len(words) == 2
    else:
        assert line.startswith(HDF5_TOOLS), "no test knows this command"


def without_launcher(words: list[str]) -> list[str]:
    """The command behind mpirun, horovodrun or srun, whose options are those of tests/parallel/."""
    program = words.index("python")
    options = {word for word in words[1:program] if not word.isdigit()}
    assert options <= LAUNCHER_OPTIONS[words[0]]
    assert words[0] == "srun" or "-np" in options
    return words[program:]


def without_sbatch(words: list[str]) -> list[str]:
    """The command that a script of slurm/ gives its arguments to."""
    place = next(i for i, word in enumerate(words) if i and not word.startswith("--"))
    script = ROOT / words[place]
    assert {word.partition("=")[0] for word in words[1:place]} <= SBATCH_OPTIONS
    # Before and after it, hvdlm.slurm looks after the job.
    found = re.search(r"python -m (hvdlm\.(?!slurm)\w+) (.*)\"\$[@1]\"", script.read_text())
    assert found
    own = [word for word in found[2].split() if word == "--join"]
    return ["python", "-m", found[1], *own, *words[place + 1 :]]


def check_install(arguments: list[str]) -> None:
    """By install.sh's own parser."""
    code = f'. "{ROOT / "install.sh"}"; parse_options "$@"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), argument


def check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `hvdlm.config`; of other commands run what reads the arguments."""
    if module == "pytest":
        assert all((ROOT / argument).exists() for argument in arguments)
        return
    Path("mine.toml").write_text(to_toml(RunConfig()))
    if arguments == ["--help"] or "--print_config" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            config_main(arguments)
    elif module == "hvdlm.config":
        assert config_main(arguments) == 0
    elif module == "hvdlm.train":
        load_config(arguments, prog=module)
    elif module == "hvdlm.elastic":
        check_elastic(arguments, monkeypatch)
    else:
        check_plain(module, arguments, monkeypatch)


def check_elastic(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not know goes to train."""
    command = importlib.import_module("hvdlm.elastic.__main__")
    monkeypatch.setattr(command, "drive", lambda args, rest: load_config(rest, prog="hvdlm.train"))
    monkeypatch.setattr(command, "join", lambda args: None)
    command.main(arguments)


def check_plain(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*args: Any, **options: Any) -> NoReturn:
        parse_args(*args, **options)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    command = importlib.import_module(f"{module}.__main__" if is_folder else module)
    with pytest.raises(UnderstoodError):
        command.main(arguments)


def test_from_raw_text_to_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines as they are, on little text and a tiny model, without the launcher."""
    section = (ROOT / "README.md").read_text().partition("## Your own text\n")[2]
    lines = fences(section)[0][1].splitlines()
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Once upon a time there were {i} ranks.\n" * 40)
    small = {
        "hvdlm.preprocess": ["--workers", "1", "--vocab-size", "300", "--val-fraction", "0.2"],
        "hvdlm.train": [*helpers.TINY, "--train.steps", "2"],
        "hvdlm.generate": ["--max-tokens", "4"],
    }
    monkeypatch.chdir(tmp_path)
    modules = []
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("python") :]
        module, arguments = words[2], [*words[3:], *small.get(words[2], [])]
        modules.append(module)
        if module in ("hvdlm.train", "hvdlm.evaluate"):
            # Horovod starts once a process.
            done = helpers.run([sys.executable, "-m", module, *arguments], cwd=tmp_path)
            assert done.returncode == 0, done.stdout
        else:
            command = importlib.import_module(module)
            if hasattr(command, "__path__"):
                command = importlib.import_module(f"{module}.__main__")
            assert command.main(arguments) == 0
    assert modules == [f"hvdlm.{name}" for name in ("preprocess", "train", "evaluate", "generate", "export")]
    assert (tmp_path / "export/mine/model.safetensors").exists()


def test_any_hdf5_tool_reads_a_shard(tiny_data: Path) -> None:
    text = (ROOT / "docs/formats.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(HDF5_TOOLS)]
    assert len(lines) == len(HDF5_TOOLS)
    for line in lines:
        words = shlex.split(line)
        words[0] = sys.executable if words[0] == "python" else words[0]
        if shutil.which(words[0]):
            done = subprocess.run(words, cwd=tiny_data, capture_output=True, timeout=60, check=False)
            assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_links_files_and_knobs(path: Path) -> None:
    text = path.read_text()
    assert {tag for tag, _ in fences(text)} <= TAGS
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            check_link(path, target)
    for span in spans(text):
        if re.fullmatch(r"(hvdlm|tests|docs|\.ci)/[\w./*-]*", span) and "NAME" not in span:
            assert any(ROOT.glob(span.rstrip("/"))), f"no {span}"
        for name in knobs_in(span):
            assert name in keys(RunConfig()), f"no knob {name}"


def check_link(path: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    document = path.parent / file if file else path
    assert document.exists(), target
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE) if anchor else []
    slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert not anchor or anchor in slugs, target


def knobs_in(span: str) -> list[str]:
    """Names of the form `section.key`, also after dashes."""
    sections = "|".join(RunConfig.__dataclass_fields__)
    names = re.findall(rf"^(?:--)?((?:{sections})\.[a-z_]+)(?: .*)?$", span)
    return [name for name in names if name not in NOT_KNOBS]


def test_the_file_tree_is_the_real_one() -> None:
    section = (ROOT / "README.md").read_text().partition("## The files\n")[2]
    named: set[Path] = set()
    folder = ROOT
    for line in fences(section)[0][1].splitlines():
        parent = folder if line.startswith(" ") else ROOT
        entry = parent / line.split()[0]
        if not line.startswith(" ") and entry.is_dir():
            folder = entry
        for word in re.findall(r"[\w./]+\.(?:md|py|sh|cfg|toml)\b|\b\w+/|\bLICENSE\b|\bMakefile\b", line):
            at = next((p / word for p in (parent, entry) if (p / word).exists()), None)
            assert at, f"no {word} in {parent}"
            named.add(at.resolve())
    parts = {p.resolve() for p in (ROOT / "hvdlm").iterdir() if not p.name.startswith("__")}
    assert parts <= named, f"not in README's tree: {parts - named}"


def literals(path: Path) -> Iterator[str]:
    """Every text of a source file, with a line break for what is put in."""
    if path.suffix == ".sh":
        yield path.read_text()
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)


def test_every_message_of_the_runbook_is_printed_by_some_code() -> None:
    """In tables headed `message`; an ellipsis stands for what is put in."""
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", RUNBOOK.read_text(), re.MULTILINE)
    messages = [row for table in tables for row in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]
    assert len(messages) > 20
    sources = [*(ROOT / "hvdlm").rglob("*.py"), *(ROOT / "slurm").glob("*.sh")]
    texts = {text for path in sources for text in literals(path)}
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, re.split(r" ?… ?", message))), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_every_check_of_preflight_is_in_the_runbook() -> None:
    rows = RUNBOOK.read_text().partition("### Of preflight")[2]
    for path in (ROOT / "hvdlm" / "cluster" / "preflight").glob("*.py"):
        for name in re.findall(r'Check\("(\w+)"', path.read_text()):
            assert name == "software" or f"| {name} |" in rows, name


def test_every_layer_is_in_the_table() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    layers = re.findall(r"\w+", setup["importlinter:contract:layers"]["layers"])
    rows = (ROOT / "docs/architecture.md").read_text().partition("## The life")[0]
    table = " ".join(line for line in rows.splitlines() if line.startswith("|"))
    assert [name for name in spans(table) if name in layers] == layers


def test_every_exit_code_is_in_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    codes = {value for name, value in vars(hvdlm.config).items() if name.startswith("EXIT_")}
    assert {int(code) for code in rows} == codes


def test_the_configuration_reference_is_up_to_date() -> None:
    reference = (ROOT / "docs/configuration.md").read_text()
    assert reference == to_markdown()
    assert all(f"`{name}`" in reference for name in keys(RunConfig()))


def test_decisions_are_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/decisions.md").read_text(), re.MULTILINE)
    assert all(re.match(r"\d{4}-\d\d-\d\d: \S", heading) for heading in headings)
    assert headings == sorted(headings, key=lambda heading: heading[:10], reverse=True)
