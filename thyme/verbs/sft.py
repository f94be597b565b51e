"""Train by SFT: the cold start from demonstrations with code, then math annealing until its gate is passed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from thyme.train.config import AnnealConfig, SftConfig
from thyme.verbs.config import ToyRunConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.data.rows import Demonstration
    from thyme.data.streams import Stream
    from thyme.train.metrics import Metrics, OnStep
    from thyme.train.stage import RunOptions
    from thyme.verbs.opening import Opened

ANNEAL_GATE_ROWS = 64
"""Held-out arithmetic rows behind the gate of math annealing."""


@dataclass(frozen=True, kw_only=True)
class Config(ToyRunConfig):
    """A cold start and what it is annealed by."""

    name: str = "sft"
    sft: SftConfig = field(default_factory=SftConfig)
    anneal: AnnealConfig = field(default_factory=AnnealConfig)


def run(config: Config) -> None:
    """Trains and saves the model."""
    from thyme.verbs.opening import open_model
    from thyme.verbs.training_run import open_run

    with open_run(config, "sft") as run:
        opened = open_model(config)
        run.stage("sft", opened, lambda options: train(config, opened, run.folder, **options), final="sft_{step}")
        run.stage("anneal", opened, lambda options: anneal(config, opened, run.folder, **options), final="sft")
    print(f"checkpoint: {run.folder / 'checkpoints' / 'sft'}")


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
        config: its tables `sft` and `toy`.
        opened: the model.
        folder: gets metrics.jsonl and checkpoints/; None writes nothing.
        rows: what is trained on; None: the toy world's demonstrations.
        label: of the progress line; None shows none.
        on_step: is given every step's metrics; returning True ends the stage.
        options: where the run stands.
    """
    from thyme.toy.streams import demonstration_stream
    from thyme.train.metrics import progress
    from thyme.train.sft import train_sft
    from thyme.verbs.opening import save_model, styled

    rows, system = styled(rows or demonstration_stream(config.toy), opened.dialect)
    with progress(config.sft.steps, label, {"loss": "loss"}, then=on_step) as line:
        return train_sft(
            opened.model,
            opened.processor,
            rows,
            config.sft,
            system=system,
            run_dir=folder,
            on_step=line,
            save_model=lambda to: save_model(opened, to),
            **options,
        )


def anneal(
    config: Config,
    opened: Opened,
    folder: Path | None,
    *,
    label: str | None = "anneal",
    **options: Unpack[RunOptions],
) -> list[Metrics]:
    """Math annealing, in place; no step where the gate is passed already.

    Args:
        config: its tables `anneal` and `toy`.
        opened: the model.
        folder: gets metrics.jsonl and checkpoints/; None writes nothing.
        label: of the progress line; None shows none.
        options: where the run stands.
    """
    from thyme.toy.streams import anneal_stream, heldout_arithmetic
    from thyme.train.metrics import progress
    from thyme.train.sft import Gate, RowsRight, train_sft
    from thyme.verbs.opening import save_model, styled

    settings = config.anneal
    heldout, system = styled(lambda start, n: heldout_arithmetic(config.toy, n), opened.dialect)
    rows, _ = styled(anneal_stream(config.toy), opened.dialect)
    right = RowsRight(opened.processor, heldout(0, ANNEAL_GATE_ROWS), system)
    with progress(settings.steps, label, {"loss": "loss", "gate/arithmetic": "held-out"}) as line:
        return train_sft(
            opened.model,
            opened.processor,
            rows,
            settings,
            name="anneal",
            gate=Gate(name="arithmetic", measure=right, goal=settings.gate_accuracy, every=settings.gate_steps),
            system=system,
            run_dir=folder,
            on_step=line,
            save_model=lambda to: save_model(opened, to),
            **options,
        )
