"""Train by SFT: the cold start, from demonstrations with code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from thyme.result import Result
from thyme.train.config import SftConfig
from thyme.verbs.config import TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.data.rows import Demonstration
    from thyme.data.streams import Stream
    from thyme.train.metrics import Metrics, OnStep
    from thyme.train.stage import RunOptions
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """A cold start."""

    name: str = "sft"
    sft: SftConfig = field(default_factory=SftConfig)


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    from thyme.verbs.dry_run import described

    return described(config, "sft")


def run(config: Config) -> Result:
    """Trains and saves the model."""
    from thyme.verbs.opening import adapted, open_model
    from thyme.verbs.rows import data_digest, require_training_rows
    from thyme.verbs.training_run import open_run

    require_training_rows(config)
    with open_run(config, "sft", config.distributed, data_digest=data_digest(config)) as run:
        opened = adapted(open_model(config, run.world.device), config)
        history = train(config, opened, run.folder, **run.stage("sft"))
    return run.result("sft", history)


def train(
    config: Config,
    opened: Opened,
    folder: Path | None,
    *,
    rows: Stream[Demonstration] | None = None,
    label: str | None = "sft",
    on_step: OnStep | None = None,
    **options: Unpack[RunOptions],
) -> list[Metrics]:
    """The cold start, in place.

    Args:
        config: its tables `sft`, `data`, `toy`, `eval` and `track`.
        opened: the model.
        folder: gets metrics.jsonl and checkpoints/; None writes nothing.
        rows: what is trained on where `data.train` names no files; None: the toy world's demonstrations.
        label: of the progress line; None shows none.
        on_step: is given every step's metrics; returning True ends the stage.
        options: where the run stands.
    """
    from thyme.toy.streams import demonstration_stream
    from thyme.train.sft import train_sft
    from thyme.verbs.rows import prepared_samples
    from thyme.verbs.training import stage_options, told, with_epochs

    with prepared_samples(config, opened, config.sft, rows or demonstration_stream(config.toy)) as samples:
        settings = with_epochs(config.sft, samples.count)
        with told(
            config, folder, "sft", settings.steps, label, {"loss": "loss"}, then=on_step, world=options.get("world")
        ) as line:
            stage = stage_options(config, opened, folder, line, **options)
            return train_sft(opened.model, opened.processor, samples.stream, settings, **stage)
