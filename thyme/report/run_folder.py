"""A run folder as a page reads it: what is there, and what of it is half-written, damaged or of another version.

    config.toml, run.json       what it is
    metrics.jsonl, alarms.jsonl curves
    rollouts/step_N.jsonl       rollouts; any other name too (heldout.jsonl); .NAME.jsonl is one under way
    table.md                    the figures of an evaluation
    predictions/, evidence/     what an evaluation holds of them (`thyme.report.verdicts`)
    images/                     pictures, by content

Nothing is written. A run may be under way: whatever is asked for is read again where it has changed.
"""

import json
import os
import re
import threading
import tomllib
from pathlib import Path
from typing import Any

from thyme.report.picture_store import FolderPictures, PictureStore
from thyme.report.rollout_file import RolloutFile
from thyme.report.rollout_view import Spelling, rollout_view
from thyme.report.tables import read_tables
from thyme.report.verdicts import Verdicts

_STEP = re.compile(r"\.?step_(\d+)(?:\.(\d+_of_\d+))?\.jsonl")
"""Of several ranks each has a journal of its own."""


class RunFolder:
    """One run.

    Args:
        folder: `runs/<name>`.
        spelling: of its model's tokens; None: tokens are shown by id.
        why_unspelled: in words, where there is no spelling.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder without any trace of a run.
    """

    def __init__(self, folder: Path, *, spelling: Spelling | None = None, why_unspelled: str = "") -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"run {folder}: no such folder: give one that a verb wrote, such as runs/demo")
        self.folder = folder
        self.name = os.fsencode(folder.resolve().name).decode(errors="backslashreplace")
        self.spelling, self.why_unspelled = spelling, why_unspelled
        self.pictures = PictureStore(FolderPictures(folder / "images"))
        self._files: dict[str, RolloutFile] = {}
        self._verdicts: dict[str, Verdicts] = {}
        self._lock = threading.Lock()
        if not (self._paths() or any((folder / name).is_file() for name in ("metrics.jsonl", "run.json"))):
            raise ValueError(
                f"run {folder}: no run: it has neither metrics.jsonl nor rollouts/*.jsonl: give a folder below runs/"
            )

    def described(self) -> dict[str, Any]:
        """Name, files of rollouts in order, what is wrong, and `stamp`, which changes when anything of it does."""
        files = [self._described(path) for path in self._paths()]
        state, notes = self._state()
        if self.spelling is None:
            notes.append(f"tokens are shown by their ids: {self.why_unspelled or 'no tokenizer was found'}")
        metrics, scores = [self._stamp(name) for name in ("metrics.jsonl", "alarms.jsonl")], self._stamp("table.md")
        return {
            "name": self.name,
            "files": files,
            "scores": read_tables(self.folder / "table.md"),
            "notes": notes,
            "finished": state.get("is_finished"),
            "verb": state.get("verb"),
            "max_mismatch": self._max_mismatch(),
            "metrics_stamp": "/".join(metrics),
            "stamp": json.dumps([files, metrics, scores, state.get("is_finished")]),
        }

    def metrics(self) -> dict[str, Any]:
        """`stages`: by stage the columns of metrics.jsonl, null where a step lacks a value; `problems`, in words."""
        rows, problems = self._lines("metrics.jsonl")
        stages: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            stages.setdefault(str(row.get("stage", "")), []).append(row)
        return {"stages": {stage: _columns(entries) for stage, entries in stages.items()}, "problems": problems}

    def alarms(self) -> list[dict[str, Any]]:
        """What alarms.jsonl says."""
        return self._lines("alarms.jsonl")[0]

    def table(self, name: str) -> dict[str, Any]:
        """The rollouts of a file in short (`RolloutFile.table`).

        Raises:
            KeyError: there is no such file.
        """
        return self._file(name).table(self._verdicts_of(name))

    def rollout(self, name: str, line: int) -> dict[str, Any]:
        """One rollout as a page shows it.

        Raises:
            KeyError: there is no such file, or no rollout on that line.
            ValueError: the line is no rollout any more.
        """
        row = self._file(name).row(line, self._verdicts_of(name))
        try:
            return rollout_view(row, self.pictures.pictures, self.spelling)
        except (ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{name}, line {line}: written by another version, or damaged: {type(error).__name__}: {error}"
            ) from error

    def find(self, question_id: str, near: str) -> dict[str, Any] | None:
        """The file and line of a rollout of that question: in the file `near`, else in the first that has one."""
        names = [path.name for path in self._paths()]
        for name in sorted(names, key=lambda name: self.key(name) != near):
            line = self._file(self.key(name)).find(question_id)
            if line is not None:
                return {"file": self.key(name), "line": line}
        return None

    @staticmethod
    def key(name: str) -> str:
        """What a file is called in an address: its name without ending."""
        return name.removesuffix(".jsonl")

    def _paths(self) -> list[Path]:
        """Files of rollouts, named ones first, then steps; of a journal and its file, the file."""
        paths = [p for p in (self.folder / "rollouts").glob("[!.]*.jsonl") if p.is_file()]
        done = {path.name for path in paths}
        journals = (self.folder / "rollouts").glob(".*.jsonl")
        paths += [p for p in journals if _finished_name(p.name) not in done]
        return sorted(paths, key=lambda path: (_step(path.name) is not None, _step(path.name) or 0, path.name))

    def _described(self, path: Path) -> dict[str, Any]:
        known = self._files.get(self.key(path.name))
        try:
            status = path.stat()
            stamp = f"{status.st_mtime_ns}-{status.st_size}"
        except OSError:
            stamp = "gone"
        verdicts = self._verdicts_of(self.key(path.name)).stamp()
        return {
            "key": self.key(path.name),
            "step": _step(path.name),
            "is_journal": path.name.startswith("."),
            "rank": _rank(path.name),
            "rollouts": None if known is None else len(known),
            "stamp": f"{stamp}/{verdicts}" if verdicts else stamp,
        }

    def _verdicts_of(self, key: str) -> Verdicts:
        with self._lock:
            return self._verdicts.setdefault(key, Verdicts(self.folder, key))

    def _file(self, key: str) -> RolloutFile:
        with self._lock:
            path = next((path for path in self._paths() if self.key(path.name) == key), None)
            if path is None:
                raise KeyError(key)
            file = self._files.setdefault(key, RolloutFile(path))
        file.refresh()
        return file

    def _stamp(self, name: str) -> str:
        try:
            status = (self.folder / name).stat()
        except OSError:
            return "-"
        return f"{status.st_mtime_ns}-{status.st_size}"

    def _lines(self, name: str) -> tuple[list[dict[str, Any]], list[str]]:
        """The JSON objects of a file of lines, and what is wrong with the others."""
        try:
            lines = (self.folder / name).read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], []
        rows, problems = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                rows.append(row)
            except (ValueError, RecursionError):
                where = "is half-written" if number == len(lines) else "cannot be read"
                problems.append(f"{name}: line {number} {where} and is left out")
        return rows, problems

    def _state(self) -> tuple[dict[str, Any], list[str]]:
        """What run.json says."""
        try:
            state = json.loads((self.folder / "run.json").read_bytes())
            if not isinstance(state, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            return {}, []
        except (OSError, ValueError, RecursionError) as error:
            return {}, [f"run.json cannot be read ({error})"]
        return state, []

    def _max_mismatch(self) -> float:
        """From which divergence a rollout counts as high, in nats a token: `rl.mismatch.max_kl` of the run."""
        try:
            config = tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))
            return float(config["rl"]["mismatch"]["max_kl"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.1


def _step(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return None if match is None else int(match[1])


def _finished_name(journal: str) -> str:
    """The file that takes the place of a journal."""
    step = _step(journal)
    return journal.removeprefix(".") if step is None else f"step_{step}.jsonl"


def _rank(name: str) -> str | None:
    """Such as "0 of 4", of a rank's journal."""
    match = _STEP.fullmatch(name)
    return None if match is None or match[2] is None else match[2].replace("_", " ")


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list a metric; what is no number is null, `step` excepted, which counts lines where it is missing."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step")))
    steps = [row["step"] if isinstance(row.get("step"), int) else place for place, row in enumerate(rows)]
    columns = {name: [v if isinstance(v := row.get(name), int | float) else None for row in rows] for name in names}
    return {"step": steps, **{name: column for name, column in columns.items() if any(v is not None for v in column)}}
