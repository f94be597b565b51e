"""What every stage does around its steps: resume, count, log, tell the callback, write checkpoints."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from thyme.model.processor import Processor
from thyme.model.weights import save
from thyme.train import checkpoint
from thyme.train.config import StageConfig
from thyme.train.distributed import World
from thyme.train.metrics import Metrics, MetricsLog, OnStep
from thyme.train.optim import Optimizer
from thyme.train.sharding import TrainedModel

MOST_NAMED = 8
ADVICE = "Checkpoints from before it are good: lower the learning rate, or look at these rows"
_log = logging.getLogger(__name__)


class StageOptions(TypedDict, total=False):
    """What every stage takes beside what it trains on; all may be left out."""

    run_dir: Path | None
    """Gets metrics.jsonl and checkpoints/; None writes nothing."""
    resume_from: Path | None
    """A checkpoint of this stage to go on from: weights, optimizer and random state become what they were."""
    on_step: OnStep | None
    """Is given every step's metrics; returning True ends the stage."""
    world: World | None
    """The ranks that run the stage together, every one with the same options; None: this process alone."""
    save_model: Callable[[Path], object] | None
    """Writes the model's folder of a checkpoint; None: `thyme.model.save` with nothing beside it."""


class Stage:
    """One run of one stage. `step` is the step to do next; `end_step` moves it on.

    Args:
        name: of the stage, in metrics.jsonl and in the checkpoints' names.
        trained, processor, optimizer: what a checkpoint holds. On several ranks the first one writes.
        config: says how often a checkpoint is written.
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
        self._trained, self._world = trained, trained.world
        self._save_model = options.get("save_model") or (lambda folder: save(trained.full, processor, folder))
        resume_from = options.get("resume_from")
        if resume_from is not None:
            self.step, self.memory = checkpoint.read(resume_from, trained, optimizer)
        path = None if self._run_dir is None or not self._world.is_main else self._run_dir / "metrics.jsonl"
        self._log = MetricsLog(path, name, self.step)

    def end_step(self, values: Metrics, suspects: Sequence[str] = ()) -> None:
        """Logs the step that was just done; `memory` must already say what the next one needs.

        Args:
            values: its metrics; where "optim/skipped" is 1 nothing was updated, and no checkpoint is written.
            suspects: names of the samples that may be why.

        Raises:
            FloatingPointError: so many steps in a row were skipped as the config allows.
        """
        skipped = bool(values.get("optim/skipped"))
        self.memory["skipped"] = self.memory.get("skipped", 0) + 1 if skipped else 0
        metrics = self._log.log(self.step, values)
        self.history.append(copy.copy(metrics))
        self.step += 1
        if skipped:
            self._trouble = _trouble(self._name, self.step, values, suspects)
            if self.memory["skipped"] >= self._config.max_skipped_steps:
                raise FloatingPointError(f"{self._trouble}; that is {self.memory['skipped']} in a row. {ADVICE}")
            _log.warning("thyme: %s: nothing was updated", self._trouble)
        every = self._config.save_steps
        if every and self._run_dir is not None and self.step % every == 0 and not skipped:
            folder = self._run_dir / "checkpoints" / f"{self._name}_{self.step}"
            with self._world.phase("save"):
                self._trained.publish()
                checkpoint.write(folder, self._save_model, self._optimizer, step=self.step, memory=self.memory)
        wants_end = self._on_step is not None and self._world.is_main and bool(self._on_step(metrics))
        self.stopped = self.stopped or self._world.from_main(wants_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        if error is None:
            self._trained.publish()
        if error is None and self.memory.get("skipped"):
            raise FloatingPointError(f"{self._trouble}, and that was the last step. {ADVICE}")


def _trouble(name: str, step: int, values: Metrics, suspects: Sequence[str]) -> str:
    """What was not finite, in which step (from 1), and with which rows."""
    rest = len(suspects) - MOST_NAMED
    shown = ", ".join(suspects[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
    figures = f"loss {values.get('loss', math.nan):g}, gradient norm {values['optim/grad_norm']:g}"
    return f"{name} step {step}: {figures}" + (f" (rows {shown})" if suspects else "")
