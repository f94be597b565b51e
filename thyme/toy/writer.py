"""Toy rows as files in the released formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from thyme.data.formats import rl_record, sft_record, write_rows
from thyme.toy.config import ToyConfig
from thyme.toy.streams import demonstration_stream, question_stream


def write_synthetic(
    folder: str | Path, config: ToyConfig | None = None, *, sft: int = 0, rl: int = 0, heldout: int = 0
) -> dict[Path, int]:
    """Writes sft.jsonl, rl.jsonl and heldout.jsonl with that many rows each, leaving out the empty ones.

    Args:
        folder: is made if it is not there.
        config: what the toy world is made of; None: its defaults.
        sft, rl, heldout: rows of each file.

    Returns:
        Rows by file. The same config and counts write the same bytes; a file appears only once it is complete.

    Raises:
        ValueError: a negative count, or none at all.
    """
    config = config or ToyConfig()
    folder = Path(folder)
    counts = {"sft": sft, "rl": rl, "heldout": heldout}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"rows to write must be >= 0 and not all 0, got {counts}")
    rows, asked, held = demonstration_stream(config), question_stream(config), question_stream(config, "heldout")
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "sft": lambda index: sft_record(rows(index, 1)[0]),
        "rl": lambda index: rl_record(asked(index, 1)[0]),
        "heldout": lambda index: rl_record(held(index, 1)[0]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, count in counts.items():
        if count:
            path = folder / f"{name}.jsonl"
            write_rows(path, map(makers[name], range(count)))
            written[path] = count
    return written
