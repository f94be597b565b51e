"""Count what rows hold: tokens, pictures, tags, scenarios, with percentiles."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.data.config import Format


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is counted, and by whose tokens."""

    paths: tuple[Path, ...] = field(metadata=POSITIONAL)
    """Files, or folders of *.parquet, *.jsonl and *.json."""
    format: Format = "auto"
    """How rows are laid out: thyme, messages, openai, verl or sharegpt; auto tells by each row's keys."""
    images: Path | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""
    model: Path | None = None
    """Checkpoint whose tokenizer and picture sizes count; none: a token a byte, and Qwen2.5-VL's sizes."""
    json: Path | None = None
    """A file for the figures as JSON; none: they are only printed."""


def run(config: Config) -> None:
    """Prints the table.

    Raises:
        ValueError: no row can be read.
    """
    from thyme.data.check import plain_processor
    from thyme.data.stats import gather
    from thyme.data.tables.opening import data_files
    from thyme.model.processor import Processor

    processor = plain_processor() if config.model is None else Processor.load(config.model)
    stats = gather(data_files(config.paths), processor, layout=config.format, images=config.images)
    for line in stats.table():
        print(line)
    if config.model is None:
        print("tokens are bytes: --model FOLDER counts those of a checkpoint")
    if config.json is not None:
        config.json.write_text(json.dumps(stats.to_json(), indent=2) + "\n")
