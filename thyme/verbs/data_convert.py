"""Write rows of any layout in another, as parquet or JSON lines; what cannot be used is left out and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.data.config import Format, Layout
from thyme.result import Result
from thyme.verbs.rows import row_progress


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read, and what is written."""

    paths: tuple[Path, ...] = field(metadata=POSITIONAL)
    """Files, or folders of *.parquet, *.jsonl and *.json."""
    out: Path = field(metadata=POSITIONAL)
    """The file to write, .jsonl or .parquet; it appears once it is complete."""
    to: Layout = "thyme"
    """Its layout: thyme, messages, openai, verl (questions alone) or sharegpt (demonstrations alone)."""
    format: Format = "auto"
    """How what is read is laid out; auto tells by each row's keys."""
    images: Path | None = None
    """The folder that relative paths of pictures start from; none: the folder of the file that names them."""


def run(config: Config) -> Result:
    """Says how many rows were written, and how many were left out and why."""
    from thyme.data.convert import convert
    from thyme.data.tables.opening import data_files

    files = data_files(config.paths)
    with row_progress(files, "convert") as line:
        report = convert(files, config.out, config.to, layout=config.format, images=config.images, on_row=line.advance)
    for reason, count in report.left_out.most_common():
        print(f"left out {count} rows, {reason}: the first is {report.examples[reason]}")
    print(f"{config.out}: {report.written} rows")
    return Result({"path": config.out, "written": report.written, "left_out": report.left_out})
