"""Runs the command line and kills it, as `kill -9` does, at a counted write of the store. For a process of its own:

python -m tests.build.killed half:5 data build ...     in the middle of the fifth write: half of it is in the file
python -m tests.build.killed after:5 data build ...    right after it
"""

import os
import signal
import sys
from itertools import count
from typing import BinaryIO

from thyme.build.store import Store
from thyme.cli import main


def arm(kind: str, where: int) -> None:
    """Makes the process die at that write."""
    numbers, put = count(1), Store._put

    def dying(file: BinaryIO, data: bytes) -> None:
        number = next(numbers)
        put(file, data[: len(data) // 2] if (kind, number) == ("half", where) else data)
        if number == where:
            os.kill(os.getpid(), signal.SIGKILL)

    Store._put = staticmethod(dying)  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, _, where = sys.argv[1].partition(":")
    arm(kind, int(where))
    main(sys.argv[2:])
