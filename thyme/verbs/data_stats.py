"""Count what rows hold: tokens, pictures, tags, scenarios, with percentiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.data.config import Format
from thyme.result import Result
from thyme.verbs.rows import row_progress


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


def run(config: Config) -> Result:
    """Prints the table.

    Raises:
        ValueError: no row can be read.
    """
    from thyme.data.check import plain_processor
    from thyme.data.stats import gather
    from thyme.data.tables.opening import data_files
    from thyme.model.processor import Processor

    processor = plain_processor() if config.model is None else Processor.load(config.model)
    files = data_files(config.paths)
    with row_progress(files, "stats") as line:
        stats = gather(files, processor, layout=config.format, images=config.images, on_row=line.advance)
    for text in stats.table():
        print(text)
    if config.model is None:
        print("tokens are bytes: --model FOLDER counts those of a checkpoint")
    return Result(stats.to_json())
