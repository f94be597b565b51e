"""Parquet by row group: a group is read once for all of its rows that are asked for close together."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from thyme.data.refusal import BadRow
from thyme.data.tables.table import Entry

CACHE_BYTES = 2 * 1024**3
"""Row groups that are kept, over all files; the one that was asked for last is kept whatever its size."""

_SCANNED_AT_ONCE = 16
_READ_AT_ONCE = 1 << 20


class Parquet:
    """A parquet file. A row's position is its number from 0."""

    skips = True

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: the file is damaged, or pyarrow is not installed.
        """
        self.path = path
        with self._opened() as file:
            metadata = file.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            self._rows = [group.num_rows for group in groups]
            self._bytes = [group.total_byte_size for group in groups]
            self._columns = file.schema_arrow.names
        self._starts = [0, *accumulate(self._rows)]

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return self._starts[-1]

    def scan(self, without: Collection[str] = ()) -> Iterator[Entry]:
        """See `Table.scan`; memory is bounded by a page of each column, as the file's writer cut them."""
        columns = [name for name in self._columns if name not in without]
        number = 0
        with self._opened() as file:
            batches = file.iter_batches(batch_size=_SCANNED_AT_ONCE, columns=columns, use_threads=False)
            for batch in _named(batches, self.path):
                for row in batch.to_pylist():
                    yield Entry(number, number + 1, row)
                    number += 1

    def read(self, position: int) -> Any:
        """See `Table.read`."""
        group, _ = self.block(position)
        try:
            table = _cache.get((self.path, group), self._bytes[group], lambda: self._group(group))
            (row,) = table.slice(position - self._starts[group], 1).to_pylist()
        except Exception as error:  # whatever a damaged page makes the decoder raise
            raise BadRow("unreadable", f"cannot be read ({error}): download the file again") from error
        return row

    def block(self, position: int) -> tuple[int, int]:
        """See `Table.block`."""
        group = bisect_right(self._starts, position) - 1
        return group, self._bytes[group]

    def _group(self, group: int) -> Any:
        with self._opened() as file:
            return file.read_row_group(group, use_threads=False)

    def _opened(self) -> Any:
        parquet = _pyarrow_parquet(self.path)
        try:
            return parquet.ParquetFile(self.path, buffer_size=_READ_AT_ONCE)
        except Exception as error:
            raise _damaged(self.path, error) from None


class _Groups:
    """The row groups read last, up to a number of bytes. Threads that ask for the same one wait for one read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading: dict[Any, threading.Lock] = {}
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any, size: int, read: Any) -> Any:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._held:
                    return self._held[key][0]
            group = read()
            with self._lock:
                self._held[key] = (group, size)
                self._reading.pop(key, None)
                while len(self._held) > 1 and self.bytes() > CACHE_BYTES:
                    self._held.popitem(last=False)
            return group

    def bytes(self) -> int:
        """What is held, in bytes."""
        return sum(size for _, size in self._held.values())


_cache = _Groups()


def _named(batches: Iterator[Any], path: Path) -> Iterator[Any]:
    """The batches, with an error that names the file."""
    try:
        yield from batches
    except Exception as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"data file {path}: a damaged parquet file ({' '.join(str(error).split())}): download it again")


def _pyarrow_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ValueError(f"data file {path}: parquet needs pyarrow: pip install thyme[data]") from None
    return parquet
