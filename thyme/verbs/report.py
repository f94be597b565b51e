"""Write a run as one HTML file that needs no server and no network: curves, and rollouts with their pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.result import Result


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which run, and how much of it."""

    run: Path = field(metadata=POSITIONAL)
    """Its folder, such as runs/demo."""
    out: Path | None = None
    """The file; none: report.html in the run's folder."""
    rollouts: int = 200
    """At most so many, in whole groups taken from all its files in turn; the page says what was left out."""
    model: Path | None = None
    """Whose tokenizer spells the tokens; none: a checkpoint of the run, else the model that its config names."""

    def __post_init__(self) -> None:
        if self.rollouts < 0:
            raise ValueError(f"rollouts: {self.rollouts} must be at least 0")


def run(config: Config) -> Result:
    """Writes the file, and says where it is and how large.

    Raises:
        FileNotFoundError, ValueError: no such run.
    """
    from thyme.report.single_file import report_page
    from thyme.train.durable import write_text
    from thyme.verbs.spelling import open_run

    opened = open_run(config.run, config.model)
    out = config.out or config.run / "report.html"
    page = report_page(opened, config.rollouts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page.text)
    left = f" of {page.of}" if page.rollouts < page.of else ""
    print(f"{page.rollouts}{left} rollouts, {out.stat().st_size / 1024**2:.1f} MiB: {out}")
    return Result({"path": out, "rollouts": page.rollouts, "of": page.of, "bytes": out.stat().st_size})
