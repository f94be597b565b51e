"""What an evaluation holds of its rollouts: right or wrong, and whether what tools returned bears the answer out.

Both may be known only when a rollout has long been on disk. They stand beside it, in files of the same name:

    rollouts/NAME.jsonl      the rollouts
    predictions/NAME.jsonl   settings, then a line a question: what each of its samples is worth
    evidence/NAME.jsonl      a line a sample that was looked at
"""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EVIDENCE = {"held": 1.0, "absent": 0.0}
"""What the evidence of an answer counts; any other verdict is no evidence for or against."""

Sample = tuple[str, Any]
"""Index of a question, and which of its samples."""


class Verdicts:
    """Of one file of rollouts. Read again where anything was added.

    Args:
        folder: of the run.
        name: of the file of rollouts, without its ending.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = [folder / kind / f"{name}.jsonl" for kind in ("predictions", "evidence")]
        self._lock = threading.Lock()
        self._read_at: list[str] = []
        self._prefix = ""
        self._values: dict[Sample, float] = {}
        self._found: dict[Sample, Mapping[str, Any]] = {}

    def stamp(self) -> str:
        """Changes when a verdict does; "" where there are none."""
        return "/".join(filter(None, map(_stamp, self._paths)))

    def refresh(self) -> None:
        """Reads what is there, if it is not what was read."""
        with self._lock:
            stamps = [_stamp(path) for path in self._paths]
            if stamps != self._read_at:
                self._read_at = stamps
                self._read()

    def rewards(self, question_id: str, sample: int) -> dict[str, Any]:
        """The verdict on one rollout as a training run records it: `result`, `parts` and, in words, `evidence`; what is
        not known yet is not there."""
        key = question_id.removeprefix(self._prefix), sample
        rewards: dict[str, Any] = {"result": self._values[key]} if key in self._values else {}
        found = self._found.get(key, {})
        if isinstance(verdict := found.get("verdict"), str):
            rewards["evidence"] = f"{verdict}: {found.get('reason', '')}"
            if verdict in EVIDENCE:
                rewards["parts"] = {"evidence": EVIDENCE[verdict]}
        return rewards

    def _read(self) -> None:
        predictions, evidence = self._paths
        prefix, values = "", {}
        for row in _lines(predictions):
            if isinstance(settings := row.get("settings"), Mapping):
                prefix = f"{settings.get('benchmark', '')}/"
                continue
            worth = row.get("values") or [row.get("value")]
            for sample, value in enumerate(worth if isinstance(worth, list) else ()):
                if isinstance(value, int | float):
                    values[str(row.get("index")), sample] = float(value)
        found: dict[Sample, Mapping[str, Any]] = {
            (str(row.get("index")), row.get("sample")): row for row in _lines(evidence)
        }
        self._prefix, self._values, self._found = prefix, values, found


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines. One that is being written, or is something else, costs itself alone."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row
