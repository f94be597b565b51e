"""Name every bad row of a JSONL file: tags, image counts, broken pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is checked."""

    path: Path = field(metadata=POSITIONAL)
    """Rows in a released format."""


def run(config: Config) -> None:
    """Prints every problem and the counts.

    Raises:
        ValueError: there are bad rows, or no rows at all.
    """
    from thyme.data.check import check_file

    report = check_file(config.path)
    for problem in report.problems:
        print(problem)
    print(f"{config.path}: {report.sft_rows} SFT rows, {report.rl_rows} RL rows, {report.images} images")
    if report.problems:
        raise ValueError(f"{config.path}: {report.bad_rows} bad rows, named above: mend or drop them")
