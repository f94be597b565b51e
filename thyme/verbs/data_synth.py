"""Write rows of the toy world as JSONL in the released formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.result import Result
from thyme.toy.config import ToyConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many rows, of what."""

    folder: Path = field(metadata=POSITIONAL)
    """Where sft.jsonl, rl.jsonl and heldout.jsonl go."""
    sft: int = 1000
    """Rows of demonstrations."""
    rl: int = 1000
    """Training questions."""
    heldout: int = 200
    """Held-out questions."""
    toy: ToyConfig = field(default_factory=ToyConfig)


def run(config: Config) -> Result:
    """Writes the files and says how many rows each has."""
    from thyme.toy.writer import write_synthetic

    counts = {"sft": config.sft, "rl": config.rl, "heldout": config.heldout}
    written = write_synthetic(config.folder, config.toy, **counts)
    for path, rows in written.items():
        print(f"{path}: {rows} rows")
    return Result({"written": written})
