"""Where a run's metrics are shown live: TensorBoard, trackio or Weights & Biases, behind one adapter.

metrics.jsonl stays the record; what is tracked is a copy of it, named "<stage>/<metric>" by step. These packages are
the extra `track`, imported only where one is asked for. Standard library only otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from thyme.train.config import TrackConfig

Track = Callable[[str, Mapping[str, float]], None]
"""(stage, metrics with their "step") -> shown."""


@contextmanager
def tracked(config: TrackConfig, folder: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Yields what shows a step's metrics; closes the backend at the end, also after an error.

    A run of the same name is gone on with, so that a resumed run continues its curves. What is not a finite number is
    left out: no backend draws it.

    Args:
        config: the backend.
        folder: runs/<name>/; its name is the run's.
        settings: the resolved config, shown beside the curves.

    Raises:
        ValueError: the backend's package is not installed.
    """
    if config.to == "none":
        yield lambda stage, metrics: None
        return
    opened = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[config.to]
    log, close = opened(config, folder, dict(settings))

    def track(stage: str, metrics: Mapping[str, float]) -> None:
        finite = {
            f"{stage}/{name}": value for name, value in metrics.items() if name != "step" and math.isfinite(value)
        }
        log(int(metrics["step"]), finite)

    try:
        yield track
    finally:
        close()


_Opened = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def _tensorboard(config: TrackConfig, folder: Path, settings: dict[str, Any]) -> _Opened:
    _package("tensorboard", config)
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in settings.items()))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run keeps what it had shown

    return log, writer.close


def _trackio(config: TrackConfig, folder: Path, settings: dict[str, Any]) -> _Opened:
    trackio = _package("trackio", config)
    trackio.init(project=config.project, name=folder.name, config=settings, resume="allow", embed=False)
    return lambda step, metrics: trackio.log(metrics, step=step), trackio.finish


def _wandb(config: TrackConfig, folder: Path, settings: dict[str, Any]) -> _Opened:
    wandb = _package("wandb", config)
    run = wandb.init(
        project=config.project, id=folder.name, name=folder.name, dir=str(folder), config=settings, resume="allow"
    )

    stages: set[str] = set()

    def log(step: int, metrics: dict[str, float]) -> None:
        # Each stage counts its own steps, and wandb's own step may only rise: so the step is a metric of each stage.
        found = {name.partition("/")[0] for name in metrics}
        for stage in found - stages:
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        stages.update(found)
        run.log(metrics | {f"{stage}/step": step for stage in found})

    return log, run.finish


def _package(name: str, config: TrackConfig) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"track.to {config.to!r} needs the package {name}: pip install thyme[track]") from error
