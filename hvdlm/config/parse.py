"""Configuration from TOML files, recipe names and dotted arguments, by jsonargparse."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from hvdlm.config.check import check
from hvdlm.config.errors import UserError
from hvdlm.config.knobs import RunConfig

RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = "demo"


def load_config(
    argv: Sequence[str], *, prog: str, default_recipe: str = DEFAULT_RECIPE
) -> tuple[RunConfig, str]:
    """Read a run's configuration from command-line arguments.

    Args:
        argv: `--config FILE_OR_RECIPE`, then `--section.key VALUE` in any number.
        prog: name of the command, for `--help`.
        default_recipe: taken where there is no `--config`.

    Returns:
        The checked configuration and the recipe's name (the stem of its file).

    Raises:
        UserError: unknown key (with the nearest match), wrong type, unreadable file,
            impossible combination.
        SystemExit: after `--help` or `--print_config`.
    """
    arguments, recipe_path = _resolve_recipe(list(argv), default_recipe)
    parser = _parser(prog)
    try:
        parser.parse_path(recipe_path)
    except UserError as error:
        raise UserError(f"{recipe_path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe_path}: is not a readable TOML file ({error})") from error
    sections = parser.instantiate(parser.parse_args(arguments))
    values = {f.name: getattr(sections, f.name) for f in dataclasses.fields(RunConfig)}
    return check(RunConfig(**values)), recipe_path.stem


def load_resolved(path: Path) -> RunConfig:
    """Read the `config.toml` that a run wrote.

    Raises:
        UserError: the file is missing or does not fit this version's knobs.
    """
    return load_config(["--config", str(path)], prog="hvdlm")[0]


def folder_of(config: RunConfig, recipe: str) -> Path:
    """The run folder: `train.out`, or one named after the recipe."""
    return Path(f"data/runs/{recipe}" if config.train.out == "auto" else config.train.out)


def to_toml(config: RunConfig) -> str:
    """Every knob of a configuration as TOML, in the order of its declaration."""
    parser = _parser("hvdlm")
    values = parser.parse_object(_plain(dataclasses.asdict(config)))
    return str(parser.dump(values, format="toml"))


def keys(config: RunConfig) -> dict[str, Any]:
    """The configuration as a flat mapping of dotted keys to values."""
    return {
        f"{section}.{key}": value
        for section, fields in dataclasses.asdict(config).items()
        for key, value in fields.items()
    }


class _Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_line(message)) from ex


def _parser(prog: str) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, parser_mode="toml", allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A TOML file or the name of a recipe.")
    for section in dataclasses.fields(RunConfig):
        kind = type(getattr(RunConfig(), section.name))
        parser.add_argument(f"--{section.name}", type=kind, default=kind(), help=kind.__name__)
    return parser


def _resolve_recipe(arguments: list[str], default_recipe: str) -> tuple[list[str], Path]:
    """Replace the name of a recipe by its path; put the default first where none is named."""
    path = RECIPES / f"{default_recipe}.toml"
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            path = _recipe_path(arguments[i + 1])
            return [*arguments[: i + 1], str(path), *arguments[i + 2 :]], path
        if argument.startswith("--config="):
            path = _recipe_path(argument.partition("=")[2])
            return [*arguments[:i], f"--config={path}", *arguments[i + 1 :]], path
    return ["--config", str(path), *arguments], path


def _recipe_path(name: str) -> Path:
    path = Path(name)
    recipes = {p.stem: p for p in sorted(RECIPES.glob("*.toml"))}
    if path.is_dir():
        raise UserError(f"--config {name}: is a folder; give a TOML file or one of: {', '.join(recipes)}")
    if path.is_file():
        return path
    if name in recipes:
        return recipes[name]
    hint = _nearest(name, recipes)
    raise UserError(f"--config {name}: no such file or recipe{hint}; recipes: {', '.join(recipes)}")


def _one_line(message: str) -> str:
    """jsonargparse's message on one line, with the nearest key where a key is unknown."""
    text = re.sub(r"\s+", " ", message).strip()
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
    text = re.sub(
        r"Does not validate against .* Subtypes: \[(.*?\]?)\] Errors: .* Given value: ?",
        lambda found: f"Expected {found[1].replace(', dict', ' or dict')}. Got value: ",
        text,
    )
    text = text.replace("a int.", "an int.")
    unknown = re.search(
        r"unrecognized arguments: --([\w.]+)"
        r"|Group '(?P<group>\w+)' does not accept option '(?P<key>[\w.]+)'"
        r"|Option '(?P<option>[\w.]+)' is not accepted",
        text,
    )
    if unknown is None:
        return text
    key = unknown[1] or unknown["option"] or f"{unknown['group']}.{unknown['key']}"
    known = list(_known_keys())
    return f"unknown key {key}{_nearest(key, known)}; --help lists every key"


def _nearest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """', did you mean X?' or nothing; a right key under a wrong section is found as well."""
    tail = word.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail]
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _known_keys() -> Iterator[str]:
    yield "config"
    yield from keys(RunConfig())


def _plain(values: Any) -> Any:
    """Tuples as lists, which is what TOML has."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(v) for v in values] if isinstance(values, tuple) else values
