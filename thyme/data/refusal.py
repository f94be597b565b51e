"""Why a row is left out."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """What is wrong with a row."""

    reason: str
    """The kind of it in a word or two: what rows that are left out are counted by."""
    message: str
    """What it is in this row and, behind a colon, what to do."""


class BadRow(ValueError):
    """A row that no one can read."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason, message)
