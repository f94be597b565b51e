"""What a verb tells the user beside its result, and which rank does. Loads no torch."""

import os
import sys


def is_first_rank() -> bool:
    """Whether this process is alone or the first of torchrun's ranks: known before the ranks have met."""
    return int(os.environ.get("RANK", "0")) == 0


def note(text: str) -> None:
    """One line on stderr, once whatever the number of ranks."""
    if is_first_rank():
        print(f"thyme: {text}", file=sys.stderr)
