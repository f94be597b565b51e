"""The command line of a verb: `[RECIPE] [--table.key value ...]` in, its config out.

Every key of the verb's config may be said, with `-` or `_` between words; what is said wins over the recipe. A switch
needs no value (`--rl.freeze-vision`) or takes `true` and `false`; a list takes several values; `none` leaves an
optional value out. Standard library only.
"""

import dataclasses
import enum
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from thyme.config import from_dict, keys_of, load_recipe, nearest, part_of, settings

C = TypeVar("C")


def parse(cls: type[C], args: list[str], *, recipes: Any = None, default_recipe: str | None = None) -> C:
    """The config of a verb from its arguments.

    Args:
        cls: the verb's config. A field `origins` gets, by dotted key, where a value was said.
        args: what follows the verb.
        recipes: the config class that has every table of a recipe; None: the verb takes no recipe.
        default_recipe: the recipe where none is given.

    Raises:
        ValueError: an unknown key, a missing or wrong value, too few or too many arguments; says which.
    """
    given, raw = _split(cls, args)
    origins: dict[str, str] = {}
    recipe = default_recipe
    if recipes is not None and given:
        recipe = given.pop(0)
    values: dict[str, Any] = {}
    if recipe is not None:
        values = part_of(load_recipe(recipe, recipes), cls)
        origins = dict.fromkeys(keys_of(values), f"recipe {recipe}")
    names = [f.name for f in settings(cls) if f.metadata.get("positional")]
    for index, name in enumerate(names[: len(given)]):
        # A list takes whatever those behind it leave.
        is_list = typing.get_origin(_hint(cls, name)) is tuple
        count = max(1, len(given) - len(names[index + 1 :])) if is_list else 1
        raw[name] = _value(cls, name, given[:count])
        del given[:count]
    if given:
        raise ValueError(f"unexpected argument {given[0]!r}: settings are said as --key value")
    missing = [name.upper() for name in names if name not in raw and is_required(cls, name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing (--help says more)")
    for key, value in raw.items():
        *tables, last = key.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    config = from_dict(cls, values)
    if any(f.name == "origins" for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
        origins |= dict.fromkeys(raw, "the command line")
        config = dataclasses.replace(config, origins=origins)  # type: ignore[type-var]
    return config


def is_required(cls: Any, name: str) -> bool:
    """Whether a field has no value where nothing is said."""
    (f,) = (f for f in settings(cls) if f.name == name)
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _split(cls: Any, args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments by place, and values by dotted key."""
    given: list[str] = []
    raw: dict[str, Any] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return given + rest, raw
        if not arg.startswith("--"):
            given.append(arg)
            continue
        name, has_value, value = arg.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        hint = _hint(cls, key)
        texts = [value] if has_value else []
        if not has_value and _is_switch(hint):
            words = ("true", "false") if hint is bool else ("true", "false", "none")
            texts = [rest.pop(0)] if rest and rest[0] in words else ["true"]
        elif not has_value and typing.get_origin(hint) is tuple:
            while rest and not rest[0].startswith("--"):
                texts.append(rest.pop(0))
        elif not has_value:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{flag(key)} needs a value")
            texts = [rest.pop(0)]
        raw[key] = _value(cls, key, texts)
    return given, raw


def _is_switch(hint: Any) -> bool:
    """A key that may be said without a value, which is then true."""
    return hint is bool or set(typing.get_args(hint)) == {bool, type(None)}


def _hint(cls: Any, key: str) -> Any:
    """The type of a dotted key.

    Raises:
        ValueError: there is no such key; names the nearest of all the verb's keys.
    """
    hint = cls
    for name in key.split("."):
        if typing.get_origin(hint) is dict:  # any name is a key of such a table
            hint = typing.get_args(hint)[1]
            continue
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        names = {f.name for f in settings(hint)} if hints else set()
        if name not in names:
            known = [k for k, _ in keys(cls)]
            raise ValueError(f"unknown option {flag(key)}: did you mean {flag(_nearest_key(key, known))}?")
        hint = hints[name]
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        raise ValueError(f"{flag(key)} is a table: say one of its keys, such as {flag(_first_key(hint, key))}")
    return hint


def _nearest_key(key: str, known: list[str]) -> str:
    """Keys with the same last word come first: `--steps` means `--rl.steps`, not `--sft.save-steps`."""
    last = key.rpartition(".")[2]
    return nearest(key, [k for k in known if k.rpartition(".")[2] == last] or known)


def _first_key(table: Any, key: str) -> str:
    if typing.get_origin(table) is dict:
        return f"{key}.NAME"
    return f"{key}.{settings(table)[0].name}"


def keys(cls: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every dotted key of a config with its type."""
    hints, found = typing.get_type_hints(cls), []
    for f in settings(cls):
        hint = hints[f.name]
        found += keys(hint, f"{prefix}{f.name}.") if dataclasses.is_dataclass(hint) else [(f"{prefix}{f.name}", hint)]
    return found


def value_of(cls: Any, key: str, text: str) -> Any:
    """What one word of the command line means for a dotted key, as TOML would have it.

    Raises:
        ValueError: there is no such key.
    """
    return _value(cls, key, [text])


def _value(cls: Any, key: str, texts: list[str]) -> Any:
    """What the words of the command line mean, as TOML would have it; `from_dict` checks it."""
    hint = _hint(cls, key)
    if typing.get_origin(hint) is tuple and not (len(texts) == 1 and texts[0].lstrip().startswith("[")):
        item = typing.get_args(hint)[0]
        return [_plain(item, text) for text in texts]
    return _plain(hint, texts[0])


def _plain(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if type(None) in options and text.lower() == "none":
            return None
        return _plain(next(option for option in options if option is not type(None)), text)
    literals = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    is_word = hint in (str, Path) or (isinstance(hint, type) and issubclass(hint, enum.Enum))
    if is_word or (literals and all(isinstance(value, str) for value in literals)):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # `from_dict` says what was expected


def flag(key: str) -> str:
    """A dotted key as it is said on the command line."""
    return "--" + key.replace("_", "-")
