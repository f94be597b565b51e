"""Train the toy's base stage from captions: reading and locating, in place of pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from thyme.result import Result
from thyme.toy.config import BaseStageConfig
from thyme.train.config import DistributedConfig
from thyme.verbs.config import ToyRunConfig

if TYPE_CHECKING:
    from pathlib import Path

    from thyme.train.metrics import Metrics
    from thyme.train.stage import RunOptions
    from thyme.verbs.opening import Opened


@dataclass(frozen=True, kw_only=True)
class Config(ToyRunConfig):
    """A base stage on captions of the toy world."""

    name: str = "base"
    base: BaseStageConfig = field(default_factory=BaseStageConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def run(config: Config) -> Result:
    """Trains and saves the model."""
    from thyme.verbs.opening import open_model
    from thyme.verbs.rows import require_toy
    from thyme.verbs.training_run import open_run

    require_toy(config)
    with open_run(config, "base", config.distributed) as run:
        opened = open_model(config, run.world.device)
        history = train(config, opened, run.folder, **run.stage("base"))
    return run.result("base", history)


def train(
    config: Config, opened: Opened, folder: Path, *, label: str = "base", **options: Unpack[RunOptions]
) -> list[Metrics]:
    """Trains the model in place; the last metrics hold the gates.

    Args:
        config: its tables `base` and `toy`.
        opened: the model.
        folder: gets metrics.jsonl and checkpoints/.
        label: of the progress line.
        options: where the run stands.
    """
    from thyme.toy.base import train_base
    from thyme.toy.captions import captions
    from thyme.toy.streams import caption_stream
    from thyme.train.metrics import step_progress
    from thyme.verbs.opening import save_model

    toy = config.toy
    heldout = captions(toy.seed, config.base.gate_captions, toy.material, mix=toy.captions, split="heldout")
    world = options.get("world")
    shown = {"loss": "loss", "gate/ground": "locate", "gate/one": "read"}
    with step_progress(config.base.steps, label if world is None or world.is_main else None, shown) as line:
        return train_base(
            opened.model,
            opened.processor,
            caption_stream(toy),
            config.base,
            heldout=heldout,
            run_dir=folder,
            on_step=line,
            save_model=lambda to: save_model(opened, to),
            **options,
        )
