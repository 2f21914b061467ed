"""docs/configuration.md, made from the knobs: their names, types, defaults and one-line meanings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator

from hvdlm.config import knobs
from hvdlm.config.knobs import RunConfig

_HEAD = """\
# Configuration

Made by `python -m hvdlm.config --docs` from the dataclasses in `hvdlm/config/knobs.py`; a test compares.

A run is configured by a TOML file or the name of a recipe, then by arguments, of which the last wins:

```sh
python -m hvdlm.train --config demo --train.steps 1000
```

Without `--config` it is the recipe `demo`. A file needs only what differs from the defaults below.
These print a full file to edit, check a file without torch (on a login node), and list every knob:

```sh
python -m hvdlm.config --print_config > mine.toml
python -m hvdlm.config --config mine.toml
python -m hvdlm.train --help
```

An unknown key, a wrong type or an impossible combination is one line and exit 2. What may change when a
run goes on is in the [README](../README.md#stop-and-go-on)."""


def to_markdown() -> str:
    """The whole file: a table for each section."""
    meanings = dict(_meanings())
    lines = [_HEAD]
    for section in dataclasses.fields(RunConfig):
        kind = type(getattr(RunConfig(), section.name))
        hints = typing.get_type_hints(kind)
        lines += ["", f"## {section.name}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for knob in dataclasses.fields(kind):
            cells = (
                f"`{section.name}.{knob.name}`",
                _type_name(hints[knob.name]),
                f"`{json.dumps(knob.default)}`",
                meanings[kind.__name__, knob.name],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _meanings() -> Iterator[tuple[tuple[str, str], str]]:
    """((class, attribute), the string below it): Python keeps such strings in the source alone."""
    for kind in ast.parse(inspect.getsource(knobs)).body:
        if isinstance(kind, ast.ClassDef):
            for knob, text in zip(kind.body, kind.body[1:], strict=False):
                if isinstance(knob, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield (kind.name, ast.unparse(knob.target)), ast.literal_eval(text.value)


def _type_name(kind: typing.Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(_type_name(choice) for choice in arguments)
    if typing.get_origin(kind) is dict:
        return f"table of {arguments[1].__name__}"
    return f"{len(arguments)} {arguments[0].__name__}s" if arguments else kind.__name__
