"""What every kind of file of rows can do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from thyme.data.refusal import Refusal


class Entry(NamedTuple):
    """One row on the way through a file."""

    position: int
    """What `Table.read` finds the row by."""
    number: int
    """What a reader of the file calls it: the line, or the row, from 1."""
    value: Any
    """The row; None where it cannot be read."""
    refusal: Refusal | None = None
    """Why it cannot be read."""


class Table(Protocol):
    """A file of rows. Its methods may be called from several threads at once."""

    path: Path
    skips: bool
    """Whether `scan` leaves out the columns it is told to."""

    def scan(self, without: Collection[str] = ()) -> Iterator[Entry]:
        """Every row in order; memory is bounded by a few rows, whatever their number.

        Args:
            without: columns that need not be read.
        """
        ...

    def read(self, position: int) -> Any:
        """The row at a position that `scan` gave.

        Raises:
            BadRow: the row cannot be read.
        """
        ...

    def block(self, position: int) -> tuple[int, int]:
        """(number, bytes) of the part of the file that is read at once to read this row; bytes 0: the row alone."""
        ...
