"""System calls as a list, composed in one process and made in another one, in a row, by C (csrc/fork_calls.cpp).

What puts the jail on is some eighty calls that hardly differ from child to child. Made by the interpreter they would
cost each child copies of two hundred pages: of all the objects whose reference counts move.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from thyme import _fork

_CALL = struct.Struct("=6qi5sB6x")
_COUNT = struct.Struct("=q")
_ALIGN = 8


@dataclass(frozen=True, slots=True)
class Result:
    """What an earlier call of the list returns."""

    number: int


@dataclass(frozen=True, slots=True)
class Given:
    """A descriptor, by its place among those that the process is given with the list."""

    number: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """The number that the process is given with the list."""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes whose address is handed over. `result` is put at `offset` as an int by the call that returns it."""

    content: bytes
    result: Result | None = None
    offset: int = 0


Argument = int | bytes | Result | Given | Parameter | Data | None
"""Of a system call: bytes are handed over by their address, None is 0."""


class CallList:
    """System calls in their order, up to the first that fails."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, list[int], list[int], bool]] = []
        self._stores: dict[int, int] = {}
        """Call -> where in the data its result is put."""
        self._data = bytearray()
        self.what: list[str] = []
        """What an error of each call is called."""

    def add(self, what: str, number: int, *arguments: Argument, may_fail: bool = False) -> Result:
        """Adds a call.

        Args:
            what: what an error is called.
            number: of the call, as `_fork` names them.
            arguments: at most five; those not given are 0.
            may_fail: whether the list goes on where it fails.
        """
        values, kinds = [0] * 5, [0] * 5
        for place, argument in enumerate(arguments):
            kinds[place], values[place] = self._encoded(argument)
        self._calls.append((number, values, kinds, may_fail))
        self.what.append(what)
        return Result(len(self._calls) - 1)

    def encode(self) -> bytes:
        """The list as C reads it.

        Raises:
            OSError: it has too many calls.
        """
        if len(self._calls) > _fork.MOST_CALLS:
            raise OSError(f"{len(self._calls)} system calls in one list, more than {_fork.MOST_CALLS}")
        packed = [
            _CALL.pack(number, *values, self._stores.get(place, -1), bytes(kinds), may_fail)
            for place, (number, values, kinds, may_fail) in enumerate(self._calls)
        ]
        return b"".join((_COUNT.pack(len(packed)), *packed, self._data))

    def make(self, descriptors: Sequence[int] = (), parameter: int = 0) -> None:
        """Makes the calls in this process.

        Args:
            descriptors: what `Given` counts.
            parameter: what `Parameter` stands for.

        Raises:
            OSError: of the first call that failed.
        """
        failed, code = _fork.make_calls(bytearray(self.encode()), tuple(descriptors), parameter)
        if failed >= 0:
            raise OSError(code, f"{self.what[failed]}: {os.strerror(code)}")

    def _encoded(self, argument: Argument) -> tuple[int, int]:
        """(Kind of csrc/fork_calls.hpp, value)."""
        match argument:
            case None:
                return 0, 0
            case int():
                return 0, argument
            case bytes():
                return 1, self._placed(argument + b"\0")
            case Data():
                place = self._placed(argument.content)
                if argument.result is not None:
                    self._stores[argument.result.number] = place + argument.offset
                return 1, place
            case Result():
                return 2, argument.number
            case Given():
                return 3, argument.number
            case Parameter():
                return 4, 0

    def _placed(self, content: bytes) -> int:
        self._data += bytes(-len(self._data) % _ALIGN)
        place = len(self._data)
        self._data += content
        return place
