"""The machinery of configs: dataclasses that are read from TOML strictly and written back as TOML.

A recipe is a TOML file whose tables are fields of the verbs' configs. An unknown key is an error that names the nearest
one; the resolved config of a run is written beside its results and is itself a recipe that repeats the run. What the
command line adds to it is in `thyme.options`. Standard library only.
"""

import dataclasses
import difflib
import enum
import json
import tomllib
import types
import typing
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")

POSITIONAL = {"positional": True}
"""Metadata of a field that the command line takes by its place: `thyme ask MODEL IMAGE QUESTION`."""
INTERNAL = {"internal": True}
"""Metadata of a field that is no setting: neither recipes nor the command line can say it."""
RARE = {"rare": True}
"""Metadata of a setting that few runs change: the short help only counts it."""


def settings(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a config that a recipe or the command line can say."""
    return [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _recipes().iterdir() if path.name.endswith(".toml"))


def load_recipe(recipe: str | Path, known: Any) -> dict[str, Any]:
    """Reads a recipe and checks every key and value of it.

    Args:
        recipe: a TOML file, or the name of a shipped one.
        known: the config class that has every table a recipe may have.

    Returns:
        Its tables as they stand; `part_of` takes what one verb uses.

    Raises:
        ValueError: no such recipe, not TOML, an unknown key, a value out of range; says which file and which key.
    """
    path = Path(recipe)
    try:
        text = path.read_text() if path.suffix == ".toml" or path.is_file() else _shipped(str(recipe))
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"recipe {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}") from None
    try:
        from_dict(known, raw)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    return raw


def part_of(raw: dict[str, Any], cls: Any) -> dict[str, Any]:
    """The tables and values of a recipe that the config `cls` has; the others belong to other verbs."""
    names = {f.name for f in settings(cls)}
    return {key: value for key, value in raw.items() if key in names}


def keys_of(raw: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of nested tables, dotted."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """Of the known keys the one that `key` most likely means; `lr` means `learning_rate`."""
    table, _, last = key.rpartition(".")
    for candidate in sorted(known := set(known)):
        inside, _, name = candidate.rpartition(".")
        if len(last) > 1 and inside == table and "".join(word[:1] for word in name.split("_")) == last:
            return candidate
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]


def _recipes() -> Any:
    return files("thyme.recipes")


def _shipped(name: str) -> str:
    names = shipped_recipes()
    if name not in names:
        raise ValueError(
            f"recipe {name!r}: no such file, and no recipe of that name is shipped: did you mean "
            f"{nearest(name, names)!r}? ({', '.join(names)})"
        )
    return str((_recipes() / f"{name}.toml").read_text())


def from_dict(cls: type[C], raw: dict[str, Any], where: str = "") -> C:
    """Builds the dataclass `cls` from nested dicts, strictly: unknown keys and wrong types are ValueErrors."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in settings(cls)}
    values = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"unknown key {where}{key}: did you mean {where}{nearest(key, known)}?")
        values[key] = _convert(hints[key], value, f"{where}{key}")
    try:
        return cls(**values)
    except ValueError as error:
        if not where or where.removesuffix(".") in str(error):
            raise
        raise ValueError(f"{where.removesuffix('.')}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of TOML values. None is left out: TOML has no null and every None is a default."""
    out = {}
    for f in settings(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = to_dict(value)
        elif isinstance(value, dict) and not value:
            continue  # a table of nothing
        elif value is not None:
            out[f.name] = _plain(value)
    return out


def to_toml(config: Any) -> str:
    """The resolved config as a recipe: `from_dict(type(c), tomllib.loads(to_toml(c))) == c`."""
    return table_to_toml(to_dict(config))


def table_to_toml(table: dict[str, Any]) -> str:
    """Nested dicts of TOML values as TOML."""
    lines: list[str] = []
    _write_table(table, "", lines)
    return "\n".join(lines) + "\n"


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines += [f"{_key(k)} = {_inline(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}{_key(key)}"
            lines += ["", f"[{name}]"]
            _write_table(value, f"{name}.", lines)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_inline(v) for v in value) + "]"
    return json.dumps(value)  # TOML's strings, booleans and numbers are JSON's


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) if dataclasses.is_dataclass(v) else _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r}")
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple or hint is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r}")
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r} is not one of {[m.value for m in hint]}") from None
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and type(value) is not hint:
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
