"""What the training verbs share beside the run: the length of a stage, what is told while it goes, held-out figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, Unpack

from thyme.config import to_dict
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question
from thyme.train.config import StageConfig
from thyme.train.distributed import World
from thyme.train.metrics import Metrics, OnStep, step_progress
from thyme.train.stage import RunOptions, StageOptions
from thyme.train.tracking import tracked
from thyme.verbs.config import TrainingConfig
from thyme.verbs.eval import judged
from thyme.verbs.opening import Opened, open_loop, save_model
from thyme.verbs.rows import heldout_questions

S = TypeVar("S", bound=StageConfig)


def with_epochs(config: S, count: int | None) -> S:
    """The stage with its epochs counted as steps.

    Args:
        config: of the stage.
        count: rows in an epoch; None where there is no end of them.

    Raises:
        ValueError: epochs of rows that have no end.
    """
    if not config.epochs:
        return config
    if count is None:
        raise ValueError("epochs: the toy world's rows have no end: say steps, or data.train")
    return replace(config, steps=max(1, math.ceil(config.epochs * count / config.batch_size)))


@contextmanager
def told(
    config: TrainingConfig,
    folder: Path | None,
    stage: str,
    steps: int,
    label: str | None,
    shown: Mapping[str, str],
    *,
    then: OnStep | None = None,
    world: World | None = None,
) -> Iterator[OnStep | None]:
    """What a stage is given as `on_step`: the progress line, and the tracker where there is one.

    Args:
        config: its table `track`.
        folder: of the run; None tracks nothing.
        stage: name of the stage.
        steps: at which the line is full.
        label: of the progress line; None shows none.
        shown: metric name -> short name, for the line.
        then: is told every step too, and decides whether the stage ends.
        world: of whose ranks only the first one is told anything.
    """
    if world is not None and not world.is_main:
        yield None
        return
    with step_progress(steps, label, shown, then=then) as line:
        if folder is None or config.track.to == "none":
            yield line
            return
        with tracked(config.track, folder, to_dict(config)) as track:

            def on_step(metrics: Metrics) -> bool | None:
                track(stage, metrics)
                return line(metrics) if line is not None else None

            yield on_step


def stage_options(
    config: TrainingConfig,
    opened: Opened,
    folder: Path | None,
    on_step: OnStep | None,
    loop: RolloutLoop | None = None,
    **options: Unpack[RunOptions],
) -> StageOptions:
    """Where a stage writes, whom it tells, and what it is measured by on its way.

    Args:
        config: its table `eval`.
        opened: the model.
        folder: of the run; None writes nothing.
        on_step: see `told`.
        loop: the stage's own; without one held-out questions open one each time they are asked.
        options: where the run stands.
    """
    evaluate, every = None, config.eval.every_steps
    if every and folder is not None:
        asked = heldout_questions(config, config.eval.num_questions, opened.processor)
        evaluate = partial(heldout_metrics, config, opened, asked, loop)
    return StageOptions(
        run_dir=folder,
        on_step=on_step,
        save_model=lambda to: save_model(opened, to),
        evaluate=evaluate,
        evaluate_steps=every,
        **options,
    )


def heldout_metrics(
    config: TrainingConfig, opened: Opened, asked: Sequence[Question], loop: RolloutLoop | None
) -> Metrics:
    """Held-out accuracy with its 95 % interval, overall and by source, and the share of rollouts with code; with a
    judge, also how many answers are right on its word, and how many it gave none on."""
    with nullcontext(loop) if loop is not None else open_loop(config, opened) as running:
        result = judged(config, config.eval, running, asked)
    overall = result.overall
    metrics = {"eval/accuracy": overall.accuracy, "eval/accuracy_low": overall.low, "eval/accuracy_high": overall.high}
    metrics["eval/code_share"] = overall.code_share
    if config.judge.url is not None:
        metrics |= {"eval/by_judge": float(overall.by_judge), "eval/not_judged": float(overall.errors)}
    return metrics | {f"eval/accuracy/{name}": part.accuracy for name, part in result.scenarios.items() if name}
