"""The help of a verb, made of its config: keys, defaults, and what stands below each field. Standard library only."""

import ast
import dataclasses
import enum
import inspect
import shutil
import sys
import textwrap
import typing
from functools import cache
from itertools import pairwise
from typing import Any

from thyme.config import settings, shipped_recipes
from thyme.options import flag, is_required, keys

NAMES_WIDTH = 34
"""Columns of keys and defaults at most; a longer one pushes its text aside."""


def help_text(
    verb: str,
    cls: Any,
    summary: str,
    *,
    defaults: Any,
    takes_recipe: bool,
    everything: bool,
    has_json: bool = False,
) -> str:
    """The help of a verb: its own settings in a line each, or with `everything` all of them in full.

    Args:
        verb: as it is called; the table of that name is the verb's own.
        cls: its config.
        summary: what the verb does.
        defaults: a config with the values that hold where nothing is said; None: those of the class.
        takes_recipe: whether a recipe may come first.
        everything: False says of other tables, of tables inside its own and of settings that few runs change only how
            many there are.
        has_json: whether it comes to a result that `--json` prints.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    places = [f.name for f in settings(cls) if f.metadata.get("positional")]
    hints = typing.get_type_hints(cls)
    shown_places = [_place(cls, name, hints[name]) for name in places]
    usage = " ".join(["thyme", verb, *(["[RECIPE]"] if takes_recipe else []), *shown_places])
    lines = [f"usage: {usage} [--key value ...]{' [--json]' * has_json}", "", *textwrap.wrap(summary, width), ""]
    if takes_recipe:
        said = f"a TOML file, or a shipped one: {', '.join(shipped_recipes())}; --dry-run prints what it comes to"
        lines += _entry("RECIPE", said, width, everything)
    for name in places:
        lines += _entry(name.upper(), _doc(cls, name), width, everything)
    tables = [f for f in settings(cls) if dataclasses.is_dataclass(hints[f.name])]
    for f in settings(cls):
        if f not in tables and f.name not in places:
            lines += _setting(f.name, f, cls, defaults, width, everything)
    own = next((word for word in reversed(verb.split()) if any(f.name == word for f in tables)), "")
    shown = [f for f in tables if everything or f.name == own]
    for f in shown:
        lines += ["", *textwrap.wrap(f"{f.name}: {_first_line(hints[f.name])}", width)]
        lines += _table(f.name, hints[f.name], _default(f, defaults), width, everything)
    folded = [f"{f.name} ({len(keys(hints[f.name]))})" for f in tables if f not in shown]
    for f in shown:
        inner = typing.get_type_hints(hints[f.name])
        nested = [name for g in settings(hints[f.name]) if dataclasses.is_dataclass(inner[name := g.name])]
        folded += [f"{f.name}.{name} ({len(keys(inner[name]))})" for name in nested if not everything]
        rare = sum(g.metadata.get("rare", False) for g in settings(hints[f.name]))
        folded += [f"{rare} more of {f.name}"] if rare and not everything else []
    if folded:
        lines += [
            "",
            *textwrap.wrap(f"--help-all lists every setting in full, those of {', '.join(folded)} too.", width),
        ]
    return "\n".join(lines) + "\n"


def _place(cls: Any, name: str, hint: Any) -> str:
    said = name.upper() + "..." * (typing.get_origin(hint) is tuple)
    return said if is_required(cls, name) else f"[{said}]"


def _table(prefix: str, cls: Any, values: Any, width: int, everything: bool) -> list[str]:
    hints, lines = typing.get_type_hints(cls), []
    for f in settings(cls):
        key = f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            lines += _table(key, hints[f.name], _default(f, values), width, everything) if everything else []
        elif everything or not f.metadata.get("rare"):
            lines += _setting(key, f, cls, values, width, everything)
    return lines


def _setting(key: str, f: "dataclasses.Field[Any]", cls: Any, values: Any, width: int, everything: bool) -> list[str]:
    return _entry(f"{flag(key)} [{_shown(_default(f, values))}]", _doc(cls, f.name), width, everything)


def _entry(name: str, text: str, width: int, everything: bool) -> list[str]:
    if everything:
        return [f"  {name}", *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    head = f"  {name:<{NAMES_WIDTH}}"
    room = width - len(head) - 1
    sentence = text.partition(". ")[0].rstrip(".")
    return [f"{head} {textwrap.shorten(sentence, room, placeholder=' ...')}"]


def _default(f: "dataclasses.Field[Any]", values: Any) -> Any:
    if values is not None:
        return getattr(values, f.name)
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _first_line(cls: Any) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _doc(cls: Any, name: str) -> str:
    """What stands below a field in its class, or in the class it comes from."""
    return next((docs[name] for c in cls.__mro__ if name in (docs := _docs(c))), "")


@cache
def _docs(cls: type) -> dict[str, str]:
    """Field -> the text below it in the source."""
    if "__annotations__" not in vars(cls):
        return {}
    source = inspect.getsource(sys.modules[cls.__module__])
    body = next(n.body for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    docs = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs
