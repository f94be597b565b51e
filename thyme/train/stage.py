"""What every stage does around its steps: resume, count, log, tell the callback, write checkpoints."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from thyme import trace
from thyme.interrupt import Interrupted, Postponed
from thyme.model.processor import Processor
from thyme.model.weights import save
from thyme.train import checkpoint, retention
from thyme.train.config import StageConfig
from thyme.train.distributed import World
from thyme.train.manifest import Origin
from thyme.train.metrics import Metrics, MetricsLog, OnStep
from thyme.train.optim import Optimizer
from thyme.train.sharding import TrainedModel

MOST_NAMED = 8
ADVICE = "Checkpoints from before it are good: lower the learning rate, or look at these rows"
_log = logging.getLogger(__name__)


class RunOptions(TypedDict, total=False):
    """What a run tells a stage about where it stands; all may be left out."""

    resume_from: Path | None
    """A checkpoint of this stage to go on from: weights, optimizer and random state become what they were."""
    final: str | None
    """Name of the checkpoint that the stage writes at its end, `checkpoints/<final>`; None: none."""
    origin: Origin | None
    """What the run started from, for the checkpoints' manifests."""
    world: World | None
    """The ranks that run the stage together, each with the same options; None: this process alone."""
    stop: Postponed | None
    """Signals that end the stage after a step, with a checkpoint; None: they end it where it is."""


class StageOptions(RunOptions, total=False):
    """What every stage takes beside what it trains on; all may be left out."""

    run_dir: Path | None
    """Gets metrics.jsonl and checkpoints/; None writes nothing."""
    on_step: OnStep | None
    """Is given every step's metrics; returning True ends the stage."""
    save_model: Callable[[Path], object] | None
    """Writes the model into a checkpoint's folder; None: `thyme.model.save` with nothing beside it."""
    evaluate: Callable[[], Metrics] | None
    """Measures the model as it is, on the first rank; its figures join those of the step."""
    evaluate_steps: int
    """It is asked after every so many steps; 0: never."""


class Stage:
    """One run of one stage. `step` is the step to do next; `end_step` moves it on.

    Args:
        name: of the stage, in metrics.jsonl and in the checkpoints' names.
        trained, processor, optimizer: what a checkpoint holds.
        config: says how often a checkpoint is written, and which are kept.
        memory: what the stage must remember between steps beside weights and optimizer; a checkpoint's replaces it.
        options: see StageOptions.
    """

    def __init__(
        self,
        name: str,
        trained: TrainedModel,
        processor: Processor,
        optimizer: Optimizer,
        config: StageConfig,
        *,
        memory: dict[str, Any] | None = None,
        **options: Unpack[StageOptions],
    ) -> None:
        self.history: list[Metrics] = []
        self.stopped = False
        self.step = 0
        self._trouble = ""
        self.memory = memory or {}
        self._name, self._config, self._optimizer = name, config, optimizer
        self._run_dir, self._on_step = options.get("run_dir"), options.get("on_step")
        self._evaluate, self._evaluate_steps = options.get("evaluate"), options.get("evaluate_steps", 0)
        self._final, self._origin = options.get("final"), options.get("origin")
        self._save_model = options.get("save_model") or (lambda folder: save(trained.full, processor, folder))
        self._trained, self._world = trained, trained.world
        self._stop = options.get("stop") or nullcontext()
        self._scores: list[float] = []
        if (resume_from := options.get("resume_from")) is not None:
            self.step, self.memory = checkpoint.read(resume_from, trained, optimizer, stage=name)
        self.saved_step = self.step
        """The step that a run which is killed would begin again with."""
        path = None if self._run_dir is None or not self._world.is_main else self._run_dir / "metrics.jsonl"
        self._log = MetricsLog(path, name, self.step)

    def end_step(self, values: Metrics, suspects: Sequence[str] = ()) -> None:
        """Logs the step that was just done; `memory` must already say what the next one needs.

        Args:
            values: its metrics; where "optim/skipped" is 1 an update was not made, and no checkpoint is written.
            suspects: names of the samples that may be why.

        Raises:
            FloatingPointError: so many steps in a row were skipped as the config allows.
            checkpoint.SaveError: a checkpoint could not be written, and the config says to stop then.
            Interrupted: a signal came, and a checkpoint is written.
        """
        skipped = bool(values.get("optim/skipped"))
        self.memory["skipped"] = self.memory.get("skipped", 0) + 1 if skipped else 0
        if self._evaluate is not None and self._evaluate_steps and (self.step + 1) % self._evaluate_steps == 0:
            self._trained.publish()
            with trace.span("steps", "evaluate"):
                values = values | self._world.on_main(self._evaluate)
        metrics = self._log.log(self.step, values)
        self.history.append(copy.copy(metrics))
        self.step += 1
        if skipped:
            self._trouble = _trouble(self._name, self.step, values, suspects)
            if self.memory["skipped"] >= self._config.max_skipped_steps:
                raise FloatingPointError(f"{self._trouble}; that is {self.memory['skipped']} in a row. {ADVICE}")
            self._warn("%s: that update was not made", self._trouble)
        if math.isfinite(score := values.get(self._config.best_metric, math.nan)):
            self._scores.append(score)
        every = self._config.save_steps
        if every and self.step % every == 0 and not skipped:
            self._save_on_the_way()
        wants_end = self._on_step is not None and self._world.is_main and bool(self._on_step(metrics))
        wants_end, signum = self._world.from_main((wants_end, getattr(self._stop, "signum", None)))
        self.stopped = self.stopped or wants_end
        if signum is not None and not self.stopped:
            if not skipped and self.saved_step != self.step:
                self._save_on_the_way()
            raise Interrupted(signum)

    def _save_on_the_way(self) -> None:
        if self._run_dir is None:
            return
        try:
            self._write(f"{self._name}_{self.step}")
        except checkpoint.SaveError as error:
            if self._config.on_save_error == "stop":
                raise
            self._warn("%s; training goes on, as on_save_error says", error)
            return
        if self._world.is_main:
            self._retain(self._run_dir / "checkpoints")
        self._scores = []

    def _retain(self, folder: Path) -> None:
        best = None
        if metric := self._config.best_metric:
            if not self._scores:
                self._warn("%s step %d: no %s to choose the best checkpoint by", self._name, self.step, metric)
            best = retention.name_best(folder, self._name, metric, self._config.best_mode, step=self.step)
        retention.keep(folder, self._name, step=self.step, newest=self._config.keep_checkpoints, best=best)

    def _write(self, name: str) -> None:
        assert self._run_dir is not None
        self._log.sync()  # no checkpoint is on disk whose steps are not
        with self._world.phase("save"), trace.span("steps", "checkpoint"):
            self._trained.publish()
            checkpoint.write(
                self._run_dir / "checkpoints" / name,
                self._save_model,
                self._optimizer,
                world=self._world,
                stage=self._name,
                step=self.step,
                memory=self.memory,
                origin=self._origin,
                score=sum(self._scores) / len(self._scores) if self._scores else None,
            )
        self.saved_step = self.step

    def _warn(self, message: str, *values: object) -> None:
        """Once, whatever the number of ranks."""
        if self._world.is_main:
            _log.warning(f"thyme: {message}", *values)

    def __enter__(self) -> Self:
        self._stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._trained.publish()
            if error is None and self.memory.get("skipped"):
                raise FloatingPointError(f"{self._trouble}, and that was the last step. {ADVICE}")
            if error is None and self._final is not None and self._run_dir is not None:
                self._write(self._final)
        finally:
            self._stop.__exit__(kind, error, trace)
            self._log.close()


def _trouble(name: str, step: int, values: Metrics, suspects: Sequence[str]) -> str:
    """What was not finite, in which step (from 1), and with which rows."""
    rest = len(suspects) - MOST_NAMED
    shown = ", ".join(suspects[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
    figures = f"loss {values.get('loss', math.nan):g}, gradient norm {values['optim/grad_norm']:g}"
    return f"{name} step {step}: {figures}" + (f" (rows {shown})" if suspects else "")
