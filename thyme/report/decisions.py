"""What reviewers decided, in SQLite: rows are added and never changed, and the last word of a reviewer holds.

A row of data is known by what it says and shows, not by its place in a file: a file that is sorted or joined anew keeps
its decisions, and a row that was changed has none.
"""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Verdict = Literal["accept", "reject", "edit"]

SCHEMA_VERSION = 1

_SCHEMA = f"""
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    reviewer TEXT NOT NULL,
    row TEXT NOT NULL,
    place TEXT NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ({", ".join(repr(verdict) for verdict in get_args(Verdict))})),
    response TEXT,
    note TEXT NOT NULL DEFAULT ''
);
CREATE TRIGGER no_update BEFORE UPDATE ON decisions BEGIN SELECT RAISE(ABORT, 'decisions are only added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON decisions BEGIN SELECT RAISE(ABORT, 'decisions are only added'); END;
CREATE INDEX by_row ON decisions (row, reviewer, id);
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One word of one reviewer on one row."""

    row: str
    """Digest of the row."""
    place: str
    """Where it stood, for people."""
    reviewer: str
    verdict: Verdict
    response: str | None = None
    """In place of the row's, where it was edited."""
    note: str = ""
    at: float = 0.0
    """Seconds since 1970."""


class Agreement(NamedTuple):
    """Of two reviewers, on the rows that both decided."""

    one: str
    other: str
    rows: int
    agreed: int
    kappa: float | None
    """Cohen's: 1 full agreement, 0 what chance would give; None where nothing can be said (no rows, or one verdict)."""


class Decisions:
    """A file of decisions, made where there is none. May be used from several threads, and by several processes.

    Raises:
        ValueError: the file is something else, or of a version that this one does not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def add(self, decision: Decision) -> None:
        """Adds one, dated now; on disk when this returns.

        Raises:
            ValueError: no reviewer, a verdict that is none, or a response that does not go with it.
        """
        if not decision.reviewer.strip():
            raise ValueError("a decision needs a reviewer's name")
        if decision.verdict not in get_args(Verdict):
            raise ValueError(f"verdict {decision.verdict!r}: one of {', '.join(get_args(Verdict))}")
        if (decision.verdict == "edit") != (decision.response is not None):
            raise ValueError("an edit has a response of its own, and nothing else has one")
        values = (time.time(), decision.reviewer, decision.row, decision.place, decision.verdict, decision.response)
        with self._lock:
            self._connection.execute(
                "INSERT INTO decisions (at, reviewer, row, place, verdict, response, note) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*values, decision.note),
            )

    def latest(self) -> dict[str, dict[str, Decision]]:
        """By row and reviewer, the last word."""
        with self._lock:
            found = self._connection.execute(
                "SELECT row, place, reviewer, verdict, response, note, at FROM decisions ORDER BY id"
            ).fetchall()
        words: dict[str, dict[str, Decision]] = {}
        names = ("row", "place", "reviewer", "verdict", "response", "note", "at")
        for values in found:
            decision = Decision(**dict(zip(names, values, strict=True)))
            words.setdefault(decision.row, {})[decision.reviewer] = decision
        return words

    def history(self, row: str) -> list[Decision]:
        """All that was said of a row, in order."""
        with self._lock:
            found = self._connection.execute(
                "SELECT place, reviewer, verdict, response, note, at FROM decisions WHERE row = ? ORDER BY id", (row,)
            ).fetchall()
        names = ("place", "reviewer", "verdict", "response", "note", "at")
        return [Decision(row=row, **dict(zip(names, values, strict=True))) for values in found]

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _open(self) -> None:
        try:
            self._connection.execute("PRAGMA synchronous = FULL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not version and not tables:
                self._connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
                return
        except sqlite3.DatabaseError as error:
            raise ValueError(f"decisions {self.path}: no file of decisions ({error}): name another") from None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"decisions {self.path}: of version {version}, this thyme reads {SCHEMA_VERSION}: name another file"
            )


def agreements(words: Mapping[str, Mapping[str, Decision]]) -> list[Agreement]:
    """Of every two reviewers.

    Args:
        words: as `Decisions.latest` gives them.
    """
    reviewers = sorted({reviewer for of_row in words.values() for reviewer in of_row})
    found = []
    for one, other in combinations(reviewers, 2):
        both = [
            (of_row[one].verdict, of_row[other].verdict)
            for of_row in words.values()
            if one in of_row and other in of_row
        ]
        agreed = sum(a == b for a, b in both)
        found.append(Agreement(one, other, len(both), agreed, cohens_kappa(both)))
    return found


def cohens_kappa(pairs: Iterable[tuple[str, str]]) -> float | None:
    """(observed - expected) / (1 - expected) agreement; None without pairs, or where chance alone always agrees."""
    pairs = list(pairs)
    if not pairs:
        return None
    total = len(pairs)
    one, other = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(one[verdict] * other[verdict] for verdict in one) / total**2
    observed = sum(a == b for a, b in pairs) / total
    return None if expected == 1 else (observed - expected) / (1 - expected)


def settled(of_row: Mapping[str, Decision]) -> Decision | None:
    """What reviewers of a row come to: the last edit, or an acceptance, where all who decided would keep it.

    None where somebody rejects it, where two edits differ, or where nobody decided.
    """
    words = sorted(of_row.values(), key=lambda decision: decision.at)
    if not words or any(word.verdict == "reject" for word in words):
        return None
    edits = [word for word in words if word.verdict == "edit"]
    if len({word.response for word in edits}) > 1:
        return None
    return edits[-1] if edits else words[-1]
