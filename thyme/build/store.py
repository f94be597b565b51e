"""What a build has done so far, on disk: each row once, whatever ends the process.

    runs/<name>/rows/<split>-00000-of-00001.jsonl     rows that are kept, in the released layout
    runs/<name>/review/queue-00000-of-00001.jsonl     rows that wait for a person's word
    runs/<name>/journal/00000-of-00001.jsonl          a line for each item that has ended, of all fates

A row is written, and is on the disk, before its line in the journal, which says how long the row's file is with it. At
opening a line that has no end is cut off, and so is what a file holds beyond what the journal knows of: that item is
made again, from answers that are kept, and comes out once.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from thyme.build.outcome import Outcome
from thyme.shard import Shard


class Store:
    """The files of one shard of a build. Use as a context manager; one process at a time.

    Args:
        folder: runs/<name>.
        shard: names the files.
        identity: what the outcomes depend on, JSON-able; a folder made under another one is refused.

    Raises:
        ValueError: another process builds this shard, the folder is of another build or other shards, or its rows were
            changed by somebody else.
    """

    def __init__(self, folder: Path, shard: Shard, identity: Mapping[str, Any]) -> None:
        self._folder, self._shard = folder, shard
        self._files: dict[Path, BinaryIO] = {}
        self.done: set[int] = set()
        """Items that have ended."""
        journals = folder / "journal"
        journals.mkdir(parents=True, exist_ok=True)
        others = [p for p in journals.glob("*.jsonl") if not p.stem.endswith(f"-of-{shard.count:05d}")]
        if others:
            raise ValueError(
                f"{folder}: was built in shards of {others[0].stem}: say the same count, or another --name"
            )
        path = journals / f"{shard.name}.jsonl"
        self._journal = path.open("r+b" if path.exists() else "w+b", buffering=0)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise ValueError(f"{path}: another process builds this shard: wait for it, or say another --name") from None
        try:
            self._open(json.dumps(identity, sort_keys=True))
        except BaseException:
            self._journal.close()
            raise

    def add(self, outcome: Outcome) -> None:
        """Writes the end of an item; when this returns it is on the disk. An item that has ended already is left."""
        if outcome.item in self.done:
            return
        line: dict[str, Any] = {
            name: getattr(outcome, name)
            for name in ("item", "id", "scenario", "state", "gate", "reason", "detail", "split")
        }
        if outcome.row is not None:
            path = self._path(outcome)
            line |= {"file": str(path.relative_to(self._folder)), "end": self._write(path, outcome.row)}
        self._put(self._journal, json.dumps(line).encode() + b"\n")
        self.done.add(outcome.item)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._files.values(), self._journal):
            file.close()

    def _open(self, identity: str) -> None:
        """Reads what has ended, and cuts off what has not."""
        first, *lines = self._journal.read().splitlines(keepends=True) or [b""]
        header = json.dumps({"identity": identity}).encode() + b"\n"
        if not first.endswith(b"\n"):
            self._journal.seek(0)
            self._journal.truncate()
            self._put(self._journal, header)
            lines = []
        elif first != header:
            raise ValueError(f"{self._folder}: was built from other rows or under another recipe: say another --name")
        end, ends = len(header), dict[str, int]()
        for line in lines:
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self.done.add(entry["item"])
            if "file" in entry:
                ends[entry["file"]] = entry["end"]
            end += len(line)
        for file, length in ends.items():
            _require_rows(self._folder / file, length)
        self._journal.truncate(end)
        self._journal.seek(end)
        for folder in ("rows", "review"):
            for path in (self._folder / folder).glob(f"*-{self._shard.name}.jsonl"):
                os.truncate(path, ends.get(str(path.relative_to(self._folder)), 0))

    def _path(self, outcome: Outcome) -> Path:
        folder, stem = ("review", "queue") if outcome.state == "review" else ("rows", outcome.split)
        return self._folder / folder / f"{stem}-{self._shard.name}.jsonl"

    def _write(self, path: Path, row: Mapping[str, Any]) -> int:
        """Appends a row; the length of its file with it."""
        if path not in self._files:
            path.parent.mkdir(exist_ok=True)
            self._files[path] = path.open("ab", buffering=0)
        self._put(self._files[path], json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        return self._files[path].tell()

    @staticmethod
    def _put(file: BinaryIO, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _require_rows(path: Path, length: int) -> None:
    """
    Raises:
        ValueError: the file has not the rows that were written to it, in the first `length` bytes.
    """
    try:
        with path.open("rb") as file:
            file.seek(length - 1)
            is_whole = file.read(1) == b"\n"
    except FileNotFoundError:
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{path}: is not what the build wrote: it cannot go on there: put it back as it was (and change a copy), "
            "or say another --name"
        )


def journaled(folder: Path) -> Iterator[dict[str, Any]]:
    """Every end that the journals of a build know of, of all its shards; rows aside."""
    for path in sorted((folder / "journal").glob("*.jsonl")):
        with path.open("rb") as file:
            next(file, None)
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
