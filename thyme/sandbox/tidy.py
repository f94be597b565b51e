"""autopep8's reading of a broken indentation, under a bound of its own: some input makes it loop for ever."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

MAX_CHARACTERS = 4096
MAX_STEPS = 60_000
"""Lines of Python that autopep8 may run; about 25 ms; a snippet of 30 lines takes half of it."""


class _OutOfSteps(BaseException):
    """Not an Exception: autopep8 must not catch it."""


def tidied(text: str) -> str | None:
    """The text with its indentation tidied; None if that would cost too much, loses or adds a line, or is more than
    autopep8 can bear."""
    if len(text) > MAX_CHARACTERS:
        return None
    import autopep8

    left, stopped = MAX_STEPS, False

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left, stopped
        left -= 1
        # Once, and never in a generator: one that is being closed can't pass it on.
        if left < 0 and not stopped and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            stopped = True
            raise _OutOfSteps
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        out = str(autopep8.fix_code(text, options={"select": ["E1", "W1"], "aggressive": 0}))
    except (Exception, _OutOfSteps):  # whatever trips it, the snippet's own error is what the model must see
        return None
    finally:
        sys.settrace(before)
    same = out.count("\n") - out.endswith("\n") == text.count("\n") - text.endswith("\n")
    return out if same else None
