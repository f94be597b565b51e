"""Runs the command line and kills it, as `kill -9` does, at a counted event. For a process of its own:

python -m tests.verbs.killed files:40 rl recipe.toml      at the 40th file that is opened, renamed or made in runs/
python -m tests.verbs.killed 'path:rl_4.*state' rl ...    at the first of those whose path the pattern is found in
python -m tests.verbs.killed journal:3 rl recipe.toml     after the third line of a journal
"""

import os
import re
import signal
import sys
from itertools import count
from typing import Any

from thyme.cli import main
from thyme.rollout.journal import Journal

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, where: str) -> None:
    """Makes the process die at that event."""
    events = count(1)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and "runs" in str(args[0]):
            number = next(events)
            if (kind == "files" and number == int(where)) or (kind == "path" and re.search(where, str(args[0]))):
                die()

    def put(journal: Journal, line: bytes) -> None:
        put_line(journal, line)
        if next(events) == int(where):
            die()

    if kind == "journal":
        put_line, Journal._put = Journal._put, put  # type: ignore[method-assign]
    else:
        sys.addaudithook(audit)


if __name__ == "__main__":
    kind, _, where = sys.argv[1].partition(":")
    arm(kind, where)
    main(sys.argv[2:])
