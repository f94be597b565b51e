"""The review queue: rows that wait for a person's word, and what becomes of them when it is said.

    runs/<name>/review/queue-*.jsonl      rows as they would be written, with their id
    runs/<name>/review/decisions.jsonl    {"id": ..., "keep": true} or false, a line each; the last of an id counts

A decision may carry a `response`, which replaces the row's. Rows that are kept go to runs/<name>/rows/reviewed.jsonl,
which is made anew from both files each time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Reviewed:
    """Where the queue stands."""

    kept: int
    rejected: int
    waiting: int


def apply_decisions(folder: Path) -> Reviewed:
    """Writes the rows of a build that were reviewed and kept.

    Args:
        folder: runs/<name>.

    Raises:
        ValueError: a decision that is none; names its line.
    """
    decisions = _decisions(folder / "review" / "decisions.jsonl")
    counts = {True: 0, False: 0, None: 0}
    out = folder / "rows" / "reviewed.jsonl"
    partial = out.with_name(f".{out.name}.partial")
    queues = sorted((folder / "review").glob("queue-*.jsonl"))
    if not queues:
        return Reviewed(0, 0, 0)
    out.parent.mkdir(exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for queue in queues:
            with queue.open(encoding="utf-8") as lines:
                for line in lines:
                    if not line.endswith("\n"):
                        break
                    row = json.loads(line)
                    decision = decisions.get(row["id"])
                    counts[None if decision is None else decision["keep"]] += 1
                    if decision is not None and decision["keep"]:
                        row["response"] = decision.get("response") or row["response"]
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if counts[True]:
        partial.replace(out)
    else:
        partial.unlink()
        out.unlink(missing_ok=True)
    return Reviewed(counts[True], counts[False], counts[None])


def _decisions(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            if not isinstance(said["id"], str) or not isinstance(said["keep"], bool):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}: line {number}: give {{"id": "...", "keep": true or false}}') from None
        found[said["id"]] = said
    return found
