"""SFT on rows, as tests want it."""

from typing import Unpack

from thyme.data.rows import Demonstration
from thyme.data.streams import Stream
from thyme.model import Model, Processor
from thyme.train.config import SftConfig
from thyme.train.metrics import Metrics
from thyme.train.sft import Gate, row_samples, train_sft
from thyme.train.stage import StageOptions


def train_rows(
    model: Model,
    processor: Processor,
    rows: Stream[Demonstration],
    config: SftConfig,
    *,
    name: str = "sft",
    gate: Gate | None = None,
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    samples = row_samples(processor, rows, config.loss_rule, "short")
    return train_sft(model, processor, samples, config, name=name, gate=gate, **options)
