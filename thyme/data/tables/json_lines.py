"""JSON lines by byte offset: a row is one seek and one line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from thyme.data.refusal import BadRow
from thyme.data.tables.table import Entry

MAX_ROW_BYTES = 256 * 1024**2
"""A longer line is named and skipped."""


class JsonLines:
    """One JSON object a line, in UTF-8, with or without a byte order mark. A row's position is the byte its line
    begins at."""

    skips = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self, without: Collection[str] = ()) -> Iterator[Entry]:
        """See `Table.scan`; a line is parsed whole, so `without` saves nothing."""
        number = position = 0
        with self.path.open("rb") as file:
            while line := file.readline(MAX_ROW_BYTES + 1):
                number, start, rest = number + 1, position, line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_ROW_BYTES + 1)
                position = file.tell()
                if not line.strip():
                    continue
                try:
                    entry = Entry(start, number, _parsed(line, start))
                except BadRow as error:
                    entry = Entry(start, number, None, error.refusal)
                yield entry

    def read(self, position: int) -> Any:
        """See `Table.read`."""
        with self.path.open("rb") as file:
            file.seek(position)
            return _parsed(file.readline(MAX_ROW_BYTES + 1), position)

    def block(self, position: int) -> tuple[int, int]:
        """See `Table.block`."""
        return position, 0


def _parsed(line: bytes, position: int) -> Any:
    """The value of a line that begins at that byte; a file may begin with a byte order mark."""
    if position == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    if len(line) > MAX_ROW_BYTES:
        raise BadRow("too large", f"over {MAX_ROW_BYTES >> 20} MiB: smaller pictures, or fewer")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at {error.start}"
        raise BadRow("not UTF-8", f"not UTF-8: {where}: save the file in UTF-8") from None
    except Exception as error:  # RecursionError and MemoryError too
        array = " (one JSON array? write one object a line)" if line.lstrip().startswith(b"[") else ""
        mark = " (a byte order mark: two files joined? take it out)" if line.startswith(codecs.BOM_UTF8) else ""
        raise BadRow("not JSON", f"not JSON: {type(error).__name__}: {error}{array}{mark}") from None
