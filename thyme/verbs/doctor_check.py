"""One thing that the doctor looked at. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, what was found, and the command that mends it."""

    part: str
    """machine, packages, kernels, parity or sandbox."""
    name: str
    ok: bool
    needed: bool
    """Whether this project fails without it; else something is slower or cannot be done."""
    found: str
    remedy: str = ""
    """A command, or what else to do; "" where nothing is to be mended."""
