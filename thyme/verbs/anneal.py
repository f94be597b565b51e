"""Train by math annealing after the cold start: arithmetic with every round trained, at a lower rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from thyme.result import Result
from thyme.train.config import AnnealConfig
from thyme.verbs.config import TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.train.metrics import Metrics
    from thyme.train.sft import Gate
    from thyme.train.stage import RunOptions
    from thyme.verbs.opening import Opened

GATE_ROWS = 64
"""Held-out arithmetic rows behind the toy world's gate."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Math annealing: on the rows of `data.train`, or on the toy world's arithmetic until its gate is passed."""

    name: str = "anneal"
    anneal: AnnealConfig = field(default_factory=AnnealConfig)


def described(config: Config) -> Iterator[str]:
    """What `--dry-run` says beside the config."""
    from thyme.verbs.dry_run import described

    return described(config, "anneal")


def run(config: Config) -> Result:
    """Trains and saves the model."""
    from thyme.verbs.opening import adapted, open_model
    from thyme.verbs.rows import data_digest, require_training_rows
    from thyme.verbs.training_run import open_run

    require_training_rows(config)
    with open_run(config, "anneal", config.distributed, data_digest=data_digest(config)) as run:
        opened = adapted(open_model(config, run.world.device), config)
        history = train(config, opened, run.folder, **run.stage("anneal"))
    return run.result("anneal", history)


def train(
    config: Config,
    opened: Opened,
    folder: Path | None,
    *,
    label: str | None = "anneal",
    **options: Unpack[RunOptions],
) -> list[Metrics]:
    """Math annealing, in place; on the toy world's rows no step where the gate is passed already.

    Args:
        config: its tables `anneal`, `data`, `toy`, `eval` and `track`.
        opened: the model.
        folder: gets metrics.jsonl and checkpoints/; None writes nothing.
        label: of the progress line; None shows none.
        options: where the run stands.
    """
    from thyme.toy.streams import anneal_stream
    from thyme.train.sft import train_sft
    from thyme.verbs.rows import prepared_samples
    from thyme.verbs.training import stage_options, told, with_epochs

    gate = None if config.data.train else toy_gate(config, opened)
    shown = {"loss": "loss", "gate/arithmetic": "held-out"}
    with prepared_samples(config, opened, config.anneal, anneal_stream(config.toy)) as samples:
        settings = with_epochs(config.anneal, samples.count)
        with told(config, folder, "anneal", settings.steps, label, shown, world=options.get("world")) as line:
            stage = stage_options(config, opened, folder, line, **options)
            return train_sft(
                opened.model, opened.processor, samples.stream, settings, name="anneal", gate=gate, **stage
            )


def toy_gate(config: Config, opened: Opened) -> Gate:
    """Held-out arithmetic of the toy world, right to the last token."""
    from thyme.toy.streams import heldout_arithmetic
    from thyme.train.sft import Gate, RowsRight

    settings = config.anneal
    right = RowsRight(opened.processor, heldout_arithmetic(config.toy, GATE_ROWS), opened.dialect.prompt_style)
    return Gate(name="arithmetic", measure=right, goal=settings.gate_accuracy, every=settings.gate_steps)
