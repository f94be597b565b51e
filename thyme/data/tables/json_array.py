"""One JSON array of rows, as LLaVA and LLaMA-Factory keep theirs, by byte offset: a row is one seek and one parse."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from thyme.data.refusal import BadRow
from thyme.data.tables.json_lines import MAX_ROW_BYTES
from thyme.data.tables.table import Entry

_BETWEEN = re.compile(r"[\s,]*")
_LEAST_READ = 4096


class _Element(NamedTuple):
    value: Any
    start: int
    """The byte it begins at."""
    end: int


class JsonArray:
    """An array of objects in UTF-8. A row's position is the byte it begins at; its number is its place, from 1."""

    skips = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self, without: Collection[str] = ()) -> Iterator[Entry]:
        """See `Table.scan`; a row is parsed whole, so `without` saves nothing.

        Raises:
            ValueError: the array breaks off, or something in it is no JSON: what follows cannot be told apart.
        """
        with self.path.open("rb") as file:
            head = file.read(_LEAST_READ)
            position, number, size = head.index(b"[") + 1, 0, _LEAST_READ
            while (element := self._element(file, position, size)) is not None:
                number += 1
                yield Entry(element.start, number, element.value)
                size = max(_LEAST_READ, 2 * (element.end - element.start))
                position = element.end

    def read(self, position: int) -> Any:
        """See `Table.read`."""
        with self.path.open("rb") as file:
            try:
                element = self._element(file, position, _LEAST_READ)
            except ValueError as error:
                raise BadRow("not JSON", str(error)) from error
        assert element is not None
        return element.value

    def block(self, position: int) -> tuple[int, int]:
        """See `Table.block`."""
        return position, 0

    def _element(self, file: BinaryIO, position: int, size: int) -> _Element | None:
        """The element at or behind a byte; None at the array's end. Reads `size` bytes, and twice as many until it is
        whole."""
        file.seek(position)
        data = b""
        while True:
            chunk = file.read(size)
            data, is_all = data + chunk, len(chunk) < size
            size = len(data)
            try:
                text = codecs.getincrementaldecoder("utf-8")().decode(data, final=is_all)
            except UnicodeDecodeError as error:
                raise self._broken(position + error.start, "no UTF-8") from None
            between = _BETWEEN.match(text)
            assert between is not None
            begin = between.end()
            if text[begin : begin + 1] == "]":
                return None
            try:
                value, end = json.JSONDecoder().raw_decode(text, begin)
            except (json.JSONDecodeError, RecursionError) as error:
                if is_all or len(data) > MAX_ROW_BYTES or isinstance(error, RecursionError):
                    what = "it breaks off" if begin == len(text) else f"no JSON, or over {MAX_ROW_BYTES >> 20} MiB"
                    raise self._broken(position + len(text[:begin].encode()), what) from None
                continue
            if end < len(text) or is_all:  # a number may go on
                start = position + len(text[:begin].encode())
                return _Element(value, start, start + len(text[begin:end].encode()))

    def _broken(self, at: int, what: str) -> ValueError:
        return ValueError(f"data file {self.path}: a JSON array; at byte {at}: {what}: mend it")
