"""RunConfig: one run, composed from the configs that live beside their code, read from TOML with dotted overrides.

A recipe is a TOML file whose tables are the fields of RunConfig. Every key may be overridden on the command line as
`--table.key value`. An unknown key is an error that names the nearest one; the resolved config of a run is written
beside its results and is itself a recipe that repeats the run.
"""

import dataclasses
import difflib
import enum
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from thyme.data.config import DataConfig
from thyme.engine.config import EngineConfig
from thyme.evals.config import EvalConfig
from thyme.rollout.config import RolloutConfig
from thyme.sandbox.config import SandboxConfig
from thyme.train.config import AnnealConfig, BaseStageConfig, RlConfig, SftConfig

C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run is made of."""

    name: str = "run"
    """Results go to `runs/<name>/`."""
    model: str = "tiny"
    """A Hugging Face folder, or "tiny": the embedded 1.7 M parameter model with random weights."""
    seed: int = 0
    """Seeds weights, data order and sampling."""
    threads: int = 2
    """Threads of torch on a CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    base: BaseStageConfig = field(default_factory=BaseStageConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name: {self.name!r} must be one folder name: results go to runs/<name>/")
        if self.threads < 1:
            raise ValueError(f"threads: {self.threads} must be at least 1")


def load_recipe(path: Path) -> RunConfig:
    """Reads a TOML recipe. Raises ValueError naming the file, the key and the nearest known key."""
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"recipe {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}") from None
    try:
        return from_dict(RunConfig, raw)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def from_dict(cls: type[C], raw: dict[str, Any], where: str = "") -> C:
    """Builds the dataclass `cls` from nested dicts, strictly: unknown keys and wrong types are ValueErrors."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"unknown key {where}{key}: did you mean {where}{near[0]}?")
        values[key] = _convert(hints[key], value, f"{where}{key}")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of TOML values. None is left out: TOML has no null and every None is a default."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = to_dict(value)
        elif value is not None:
            out[f.name] = _plain(value)
    return out


def to_toml(config: RunConfig) -> str:
    """The resolved config as a recipe: `from_dict(RunConfig, tomllib.loads(to_toml(c))) == c`."""
    lines: list[str] = []
    _write_table(to_dict(config), "", lines)
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
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r}")
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
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
