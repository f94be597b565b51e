"""A file of rollouts, or the journal of a step that is under way: every rollout in short, any in full by its line.

A file is read once; what is appended to it is read when it is asked for again, and a file that was replaced is read
anew. Lines that are no rollout are told and passed over, so that a half-written one costs itself alone.
"""

import json
import os
import threading
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from thyme.report.rollout_summary import RolloutSummary, judged, summarize
from thyme.report.verdicts import Verdicts

COLUMNS = [field.name for field in fields(RolloutSummary)]
MOST_PROBLEMS = 20
"""Problems that are told of one file; all are counted."""


class RolloutFile:
    """The rollouts of one file. May be asked from several threads at once.

    Args:
        path: `step_N.jsonl` as `thyme.rollout.records` writes it, or `.step_N.jsonl`, a step's journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_journal = path.name.startswith(".")
        self._lock = threading.Lock()
        self._inode, self._changed, self._first = 0, 0, b""
        self._end, self._number = 0, 0
        self._places: list[tuple[int, int]] = []
        """Where each line begins, and its bytes."""
        self._summaries: dict[int, RolloutSummary] = {}
        self._by_key: dict[tuple[str, int], int] = {}
        self._last: dict[tuple[str, int], int] = {}
        """By question and sample the line that counts: an evaluation may draw a sample again."""
        self._problems: list[str] = []
        self._num_problems = 0

    def refresh(self) -> None:
        """Reads what is new.

        Raises:
            OSError: the file is gone or cannot be read.
        """
        with self._lock, self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            first = file.read(160)
            is_same = status.st_ino == self._inode and first.startswith(self._first) and status.st_size >= self._end
            if not is_same or (status.st_size == self._end and status.st_mtime_ns != self._changed):
                self._forget()
            self._inode, self._changed = status.st_ino, status.st_mtime_ns
            self._first = first[: first.find(b"\n") if b"\n" in first else None] if self.is_journal else first
            file.seek(self._end)
            for line in file:
                self._number += 1
                if not line.endswith(b"\n") and self.is_journal:
                    self._number -= 1
                    break  # it is being written
                self._add(line)
                self._places.append((self._end, len(line)))
                self._end += len(line)

    def table(self, verdicts: Verdicts | None = None) -> dict[str, Any]:
        """Columns of `RolloutSummary` and `line`, a list each, in the order of group, question and index; `problems`,
        in words; `stamp`, which changes when the table does.

        Args:
            verdicts: say what its lines do not.
        """

        def order(item: tuple[int, RolloutSummary]) -> tuple[int, str, int, int]:
            line, found = item
            return found.group, found.question_id, found.index, line

        with self._lock:
            summaries = self._summaries
            stamp = self._stamp()
            if verdicts is not None and verdicts.stamp():
                stamp += f"/{verdicts.stamp()}"
                verdicts.refresh()
                summaries = {
                    line: judged(found, verdicts.rewards(*key))
                    if self._last[key := (found.question_id, found.index)] == line
                    else found
                    for line, found in summaries.items()
                }
            rows = sorted(summaries.items(), key=order)
            columns: dict[str, Any] = {name: [getattr(summary, name) for _, summary in rows] for name in COLUMNS}
            columns["seed"] = [str(seed) for seed in columns["seed"]]  # more than a browser's numbers hold
            more = self._num_problems - len(self._problems)
            told = [*self._problems, *([f"and {more} more such lines"] if more else [])]
            return {"line": [line for line, _ in rows], **columns, "problems": told, "stamp": stamp}

    def stamp(self) -> str:
        """Changes when the table does."""
        with self._lock:
            return self._stamp()

    def __len__(self) -> int:
        return len(self._summaries)

    def summary(self, line: int) -> RolloutSummary:
        """Of one line.

        Raises:
            KeyError: it holds no rollout.
        """
        return self._summaries[line]

    def row(self, line: int, verdicts: Verdicts | None = None) -> dict[str, Any]:
        """The JSON object of a line, from 1.

        Args:
            verdicts: say what its rewards do not.

        Raises:
            KeyError: there is no rollout on that line.
            OSError: the file is gone.
            ValueError: the file was replaced by something else meanwhile.
        """
        with self._lock:
            if line not in self._summaries:
                raise KeyError(line)
            start, length = self._places[line - 1]
            key = self._summaries[line].question_id, self._summaries[line].index
            counts = self._last[key] == line
        with self.path.open("rb") as file:
            file.seek(start)
            row = json.loads(file.read(length))
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {line}: not a rollout")
        if verdicts is not None and counts and verdicts.stamp():
            verdicts.refresh()
            rewards = row.get("rewards")
            row["rewards"] = verdicts.rewards(*key) | (rewards if isinstance(rewards, dict) else {}) or None
        return row

    def find(self, question_id: str) -> int | None:
        """The first line with a rollout of that question."""
        with self._lock:
            return next((line for line, found in self._summaries.items() if found.question_id == question_id), None)

    def as_json(self, line: int) -> dict[str, Any]:
        """The summary of a line as a JSON object."""
        return asdict(self._summaries[line]) | {"line": line}

    def _forget(self) -> None:
        self._end, self._number, self._num_problems = 0, 0, 0
        self._places, self._summaries, self._by_key, self._last, self._problems = [], {}, {}, {}, []

    def _stamp(self) -> str:
        return f"{self._inode}-{self._number}-{self._end}"

    def _add(self, line: bytes) -> None:
        if (self.is_journal and self._number == 1) or not line.strip():
            return  # a journal begins with who wrote it
        try:
            summary = summarize(line)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            self._num_problems += 1
            if len(self._problems) < MOST_PROBLEMS:
                is_cut = not line.endswith(b"\n")
                reason = "it ends in the middle" if is_cut else f"{error}"[:120]
                self._problems.append(f"line {self._number} is no rollout and is left out: {reason}")
            return
        if self.is_journal:  # of a rollout that went on, the last line counts
            key = summary.question_id, summary.seed
            self._summaries.pop(self._by_key.get(key, 0), None)
            self._by_key[key] = self._number
        self._summaries[self._number] = summary
        self._last[summary.question_id, summary.index] = self._number
