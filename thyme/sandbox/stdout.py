"""What a snippet prints: straight into memory shared with the client, up to a limit."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

STDOUT = 1
"""The descriptor of the shared memory; what native code prints goes there as well."""
_CUT = b"\n[output cut here]\n"

# The snippet can replace these names where they come from.
_lseek, _write, _pwrite, _pread = os.lseek, os.write, os.pwrite, os.pread


class Stdout(io.RawIOBase):
    """Standard output and standard error of one snippet; what does not fit is dropped.

    Args:
        max_bytes: how much may be printed, the mark of a cut included.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.was_cut = False
        self._text = io.TextIOWrapper(self, "utf-8", "backslashreplace", write_through=True)  # type: ignore[type-var]
        self._stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")

    def install(self) -> None:
        """Makes it what `print` writes to, from its beginning, and standard input empty."""
        _lseek(STDOUT, 0, os.SEEK_SET)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = self._text  # type: ignore[misc, assignment]
        sys.stdin = self._stdin

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return STDOUT

    def write(self, data: Any) -> int:
        data = bytes(data)
        room = self.max_bytes - num_printed()
        if len(data) > room:
            self.was_cut = True
        if room > 0 and data:
            _write(STDOUT, data[:room])
        return len(data)

    def text(self) -> str:
        """All that was printed so far."""
        return _pread(STDOUT, min(num_printed(), self.max_bytes), 0).decode("utf-8", "replace")

    def finish(self) -> int:
        """Puts the mark of a cut, if there was one, over the end. Returns how many bytes there are."""
        length = num_printed()
        if self.was_cut:
            start = min(length, self.max_bytes - len(_CUT))
            _pwrite(STDOUT, _CUT, start)
            length = start + len(_CUT)
        return min(length, self.max_bytes)


_ahead: list[Stdout] = []
_kept: list[object] = []
"""What was standard output before: to give it up costs each child twenty pages."""


def make_ahead(max_bytes: int) -> None:
    """Makes the next one now: in the fork-server, for the first round of every child."""
    _ahead[:] = [Stdout(max_bytes)]
    _kept[:] = [sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]


def new_stdout(max_bytes: int) -> Stdout:
    """One for a round, made ahead or now."""
    return _ahead.pop() if _ahead and _ahead[0].max_bytes == max_bytes else Stdout(max_bytes)


def num_printed() -> int:
    """Bytes printed so far in this round, by Python or by native code."""
    return _lseek(STDOUT, 0, os.SEEK_CUR)
