"""A training run: its folder, what it started from, and where it goes on.

    runs/<name>/run.json    verb, start model and data with their digests, whether the run is finished

`thyme resume` reads it; the training verbs go through `open_run` whether they start or resume. Loads no torch until a
stage begins, so that a refusal comes at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.config import to_toml
from thyme.interrupt import Postponed, goes_on_with
from thyme.result import Result
from thyme.train.durable import recover, write_text
from thyme.train.manifest import Origin, folder_digest, text_digest
from thyme.train.retention import newest_intact
from thyme.verbs.config import EMBEDDED, RunConfig
from thyme.verbs.folders import RUN_FILE, RUNS, held, model_folder
from thyme.verbs.notes import is_first_rank

if TYPE_CHECKING:
    from thyme.train.config import DistributedConfig
    from thyme.train.distributed import World
    from thyme.train.stage import RunOptions


@dataclass(slots=True, kw_only=True)
class RunState:
    """What run.json says."""

    verb: str
    config: str
    """Digest of config.toml as it is."""
    origins: dict[str, str]
    """Where each key of the config was said (`RunConfig.origins`)."""
    origin: Origin
    is_finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state of a run.

        Raises:
            ValueError: the folder is no training run, or its run.json cannot be read.
        """
        path = folder / RUN_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is no training run that can be resumed: it has no {RUN_FILE}")
        try:
            said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**said | {"origin": Origin(**said["origin"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read: {error!r}") from None

    def write(self, folder: Path) -> None:
        """Replaces run.json in one rename."""
        write_text(folder / RUN_FILE, json.dumps(asdict(self), indent=2) + "\n")


class TrainingRun:
    """One run that is under way; `open_run` makes it."""

    def __init__(self, folder: Path, origin: Origin, world: World, *, is_resumed: bool) -> None:
        self.world = world
        """The ranks that run it; the first one keeps its books."""
        self.folder = folder
        """Gets metrics.jsonl, rollouts/ and checkpoints/."""
        self._origin, self._is_resumed = origin, is_resumed

    def stage(self, name: str) -> RunOptions:
        """What the run's stage must be told beside its config: where it goes on, and that its end is
        `checkpoints/<name>`.

        Raises:
            ValueError: a checkpoint is of a run that started from something else.
        """
        newest = self.world.on_main(lambda: self._newest(name)) if self._is_resumed else None
        more: RunOptions = {"origin": self._origin, "world": self.world, "stop": Postponed("step")}
        return {"resume_from": newest, "final": name, **more}

    def result(self, name: str, history: Sequence[Mapping[str, float]]) -> Result:
        """Says where the stage's checkpoint is; for programs the metrics of its last step too."""
        checkpoint = self.folder / "checkpoints" / name
        if self.world.is_main:
            print(f"checkpoint: {checkpoint}")
        last = history[-1] if history else None
        return Result({"run": self.folder, "checkpoint": checkpoint, "steps": len(history), "last": last})

    def _newest(self, stage: str) -> Path | None:
        found = newest_intact(self.folder / "checkpoints", stage)
        if found is None:
            print(f"resuming {self.folder}: {stage} from its beginning, as there is no checkpoint yet")
            return None
        path, manifest = found
        for what, kind in (("model_digest", "model"), ("data_digest", "data")):
            if getattr(manifest.origin, what) != getattr(self._origin, what):
                raise ValueError(f"{path} was written by a run that started from another {kind} than {self.folder}")
        print(f"resuming {self.folder}: {stage} from {path.name}, step {manifest.step}")
        return path


@contextmanager
def open_run(
    config: RunConfig, verb: str, distributed: DistributedConfig, *, data_digest: str = ""
) -> Iterator[TrainingRun]:
    """The run of a training verb, new or resumed, locked against a second process; finished where the block ends well.

    Of several ranks the first one makes, checks and locks the folder, before it meets the others.

    Args:
        config: its name says the folder; `config.resumes` says that the folder's run goes on.
        verb: the training verb.
        distributed: of the ranks, if torchrun started several.
        data_digest: of the data files, if the data are files.

    Raises:
        FileNotFoundError, ValueError: the model is no folder of a model; then nothing is written. The run exists and is
            not resumed, or another process has it. Of a resumed run model or data are no longer what they were.
    """
    folder = config.resumes or RUNS / config.name
    with goes_on_with(f"go on with: thyme resume {folder}"), ExitStack() as stack:
        origin = None
        if is_first_rank():
            origin = stack.enter_context(_begun(config, verb, folder, data_digest))
        from thyme.train.distributed import open_world

        world = stack.enter_context(open_world(distributed))
        origin = world.from_main(origin)
        assert origin is not None
        yield TrainingRun(folder, origin, world, is_resumed=config.resumes is not None)


@contextmanager
def _begun(config: RunConfig, verb: str, folder: Path, data_digest: str) -> Iterator[Origin]:
    """The folder locked, with its books; they say that the run is finished where the block ends well."""
    start = None if config.model == EMBEDDED else model_folder(Path(config.model))
    if config.resumes is None:
        _refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        for part in (folder, *(folder / name for name in ("checkpoints", "rollouts", "images"))):
            recover(part)
        digest = "" if start is None else folder_digest(start)
        if config.resumes is None:
            text = to_toml(config)
            model = EMBEDDED if start is None else str(Path(config.model).absolute())
            origin = Origin(config=text_digest(text), model=model, model_digest=digest, data_digest=data_digest)
            write_text(folder / "config.toml", text)
            state = RunState(verb=verb, config=origin.config, origins=dict(config.origins), origin=origin)
            state.write(folder)
        else:
            state = RunState.read(folder)
            _check_origin(state.origin, digest, data_digest)
        yield state.origin
        state.is_finished = True
        state.write(folder)


def _refuse_existing(folder: Path) -> None:
    """Raises where the folder has results: starting over would delete them."""
    has_lines = (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size > 0
    checkpoints = folder / "checkpoints"
    if not has_lines and not (checkpoints.is_dir() and any(path.is_dir() for path in checkpoints.iterdir())):
        return
    offer = f"`thyme resume {folder}` goes on with it, " if (folder / RUN_FILE).is_file() else ""
    raise ValueError(f"{folder} holds a run already: {offer}--name gives this one another folder")


def _check_origin(origin: Origin, model_digest: str, data_digest: str) -> None:
    """Raises where the start model, which is what the KL term is measured against, or the data have changed."""
    if model_digest != origin.model_digest:
        raise ValueError(
            f"model {origin.model}: not the model that the run started from (its files have another digest): put the "
            "old one back, or start a new run from a checkpoint"
        )
    if data_digest != origin.data_digest:
        raise ValueError("the data files are not those that the run started with: rows would be repeated or lost")
