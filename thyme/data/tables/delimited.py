"""TSV and CSV with a header: what benchmarks are published in."""

from __future__ import annotations

import codecs
import csv
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from thyme.data.refusal import BadRow, Refusal
from thyme.data.tables.table import Entry

MAX_FIELD_BYTES = 1 << 28
"""Of one field: a picture as base64 has tens of millions; what has more is a quote that nobody closed."""


class Delimited:
    """A table of text, in constant memory: one row is held at a time. A row is a dictionary by column, "" where a field
    is empty; fields may be quoted and then hold line breaks.

    Raises:
        ValueError: no header, or two columns of one name. Columns without a name are not looked at.
    """

    skips = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._delimiter = "," if path.suffix.lower() == ".csv" else "\t"
        self._lock = threading.Lock()
        csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_BYTES))
        with path.open("rb") as file:
            mark = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            file.seek(mark)
            lines = _Lines(file, mark)
            try:
                self.columns = next(csv.reader(lines, delimiter=self._delimiter), [])
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"data file {path}: its header cannot be read: {error}") from None
            self._start = lines.consumed
        if not any(self.columns):
            raise ValueError(f"data file {path}: is empty: its first line must name the columns")
        if twice := [name for name in self.columns if name and self.columns.count(name) > 1]:
            raise ValueError(f"data file {path}: two columns are named {twice[0]!r}")

    def scan(self, without: Collection[str] = ()) -> Iterator[Entry]:
        """Every row; `position` is the byte it begins at, `number` the row from 1."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            lines = _Lines(file, self._start)
            reader = csv.reader(lines, delimiter=self._delimiter)
            number, position = 0, self._start
            while True:
                try:
                    fields = next(reader, None)
                    entry = None if fields is None else self._entry(position, number + 1, fields)
                except UnicodeDecodeError as error:
                    entry = Entry(position, number + 1, None, Refusal("not UTF-8", f"not UTF-8: {error.reason}"))
                    reader = csv.reader(lines, delimiter=self._delimiter)
                except csv.Error as error:
                    entry = Entry(position, number + 1, None, Refusal("not a row", f"not a row of a table: {error}"))
                    reader = csv.reader(lines, delimiter=self._delimiter)
                if entry is None:
                    return
                if entry.value is not None or entry.refusal is not None:  # else an empty line
                    number += 1
                    yield entry
                position = lines.consumed

    def read(self, position: int) -> dict[str, str]:
        """The row that begins at byte `position`.

        Raises:
            BadRow: it cannot be read.
        """
        with self._lock, self.path.open("rb") as file:
            file.seek(position)
            try:
                entry = self._entry(position, 0, next(csv.reader(_Lines(file), delimiter=self._delimiter), []))
            except (csv.Error, UnicodeDecodeError) as error:
                raise BadRow("not a row", f"not a row of a table: {error}") from None
        if entry.refusal is not None:
            raise BadRow(*entry.refusal)
        return dict(entry.value or {})

    def block(self, position: int) -> tuple[int, int]:
        """The row alone."""
        return position, 0

    def _entry(self, position: int, number: int, fields: list[str]) -> Entry:
        if not fields:
            return Entry(position, number, None)
        if len(fields) != len(self.columns):
            message = f"{len(fields)} fields where the header names {len(self.columns)}: is the file whole?"
            return Entry(position, number, None, Refusal("wrong number of fields", message))
        return Entry(position, number, dict(zip(self.columns, fields, strict=True)))


class _Lines:
    """The lines of a file as text, and how many bytes of it they took."""

    def __init__(self, file: BinaryIO, consumed: int = 0) -> None:
        self._file = file
        self.consumed = consumed

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_FIELD_BYTES)
        if not line:
            raise StopIteration
        self.consumed += len(line)
        if len(line) == MAX_FIELD_BYTES and not line.endswith(b"\n"):
            while (rest := self._file.readline(MAX_FIELD_BYTES)) and not rest.endswith(b"\n"):
                self.consumed += len(rest)
            self.consumed += len(rest)
            raise csv.Error(f"a line of more than {MAX_FIELD_BYTES >> 20} MiB")
        return line.decode("utf-8")
