"""Go on with a training run that was stopped or killed, from its newest intact checkpoint."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from thyme.config import INTERNAL, POSITIONAL, from_dict, keys_of, to_dict, to_toml
from thyme.options import flag
from thyme.options import parse as parse_options
from thyme.result import Result
from thyme.train.durable import write_text
from thyme.train.manifest import text_digest
from thyme.verbs.config import EMBEDDED
from thyme.verbs.notes import is_first_rank
from thyme.verbs.training_run import RunState

CHANGEABLE = (
    "steps",
    "epochs",
    "save_steps",
    "keep_checkpoints",
    "best_metric",
    "best_mode",
    "on_save_error",
    "record_steps",
)
"""Keys of a stage's table that a resumed run may change; with other steps the rates follow the new ones' schedule."""
CHANGEABLE_ELSEWHERE = (
    "threads",
    "sandbox.workers",
    "data.workers",
    "data.ahead_steps",
    "data.ahead_mib",
    "track",
    "eval",
    "judge",
    "distributed",
)
"""Keys, and tables, that change how a run is run and not what it learns."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which run, and what is changed in it.

    Beside the run it takes `--key value` of the run's own verb: steps, save-steps and other keys of saving.
    """

    run: Path = field(metadata=POSITIONAL)
    """The run's folder, such as runs/rl. After it some of the run's own keys may be changed: `--rl.steps 200`, and what
    else says how long it is, how it is saved, evaluated and tracked, and how many workers it has."""
    changes: tuple[str, ...] = field(default=(), metadata=INTERNAL)
    """The words after the folder."""


def parse(args: list[str]) -> Config:
    """The config from the command line.

    Raises:
        ValueError: no folder is named.
    """
    if not args or args[0].startswith("--"):
        raise ValueError("RUN missing: name the folder of a run, such as runs/rl (--help says more)")
    return Config(run=Path(args[0]), changes=tuple(args[1:]))


def run(config: Config) -> Result | None:
    """Goes on with the run, or says that it is finished.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run to resume, or a change that a resumed run may not make.
    """
    folder = config.run
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder}: no such folder")
    state = RunState.read(folder)
    module: Any = import_module(f"thyme.verbs.{state.verb}")
    path = folder / "config.toml"
    text = path.read_text(encoding="utf-8")
    if not is_first_rank():  # the first one may be writing both anew, run.json before the config
        state = RunState.read(folder)
    elif text_digest(text) != state.config:
        raise ValueError(
            f"{path} was changed after the run wrote it: say changes on the command line, such as "
            f"`thyme resume {folder} --{state.verb}.steps 200`"
        )
    old = from_dict(module.Config, tomllib.loads(text))
    new = parse_options(module.Config, [str(path), *config.changes], recipes=module.Config)
    changed = _changed(old, new)
    _check(changed, new)
    if state.is_finished and not any(key.endswith((".steps", ".epochs")) for key in changed):
        print(f"{folder} is finished: its checkpoints are in {folder / 'checkpoints'}; more steps go on from there")
        return None
    if changed and is_first_rank():
        text = to_toml(new)
        state.config, state.is_finished = text_digest(text), False
        state.write(folder)
        write_text(path, text)
    model = new.model if new.model == EMBEDDED else state.origin.model
    return module.run(replace(new, model=model, origins=state.origins, resumes=folder))


def _changed(old: Any, new: Any) -> list[str]:
    """The dotted keys in which two configs differ."""
    before, after = (dict(_flat(to_dict(config))) for config in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _flat(table: dict[str, Any]) -> list[tuple[str, Any]]:
    def value(key: str) -> Any:
        found: Any = table
        for name in key.split("."):
            found = found[name]
        return found

    return [(key, value(key)) for key in keys_of(table)]


def _check(changed: list[str], new: Any) -> None:
    """Raises where a change would make another run of it."""
    for key in changed:
        table, _, name = key.rpartition(".")
        of_stage = name in CHANGEABLE and hasattr(getattr(new, table, None), "save_steps")
        if not of_stage and not any(key == may or key.startswith(f"{may}.") for may in CHANGEABLE_ELSEWHERE):
            stage = ", ".join(CHANGEABLE).replace("_", "-")
            others = ", ".join(CHANGEABLE_ELSEWHERE).replace("_", "-")
            raise ValueError(f"{flag(key)}: a resumed run keeps it; what may change: {stage} of its stage, {others}")
        if name == "steps" and table == "base":
            raise ValueError(f"{flag(key)}: the base stage keeps its steps: its gates and decays are counted by them")
