"""What became of a raw row, and at which gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from thyme.data.refusal import Refusal

GATES = {
    "sft": ("read", "write", "sandbox", "rules", "judge", "evidence"),
    "rl": ("read", "size", "target", "category", "cross-check", "difficulty"),
}
"""What a row passes, in order, by what is built."""

State = Literal["kept", "review", "dropped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one row. JSON-able, so that it travels between processes."""

    item: int
    """Its place among the items of the build."""
    id: str
    scenario: str
    """Or, for RL, the category."""
    state: State
    gate: str = ""
    """Where it was dropped."""
    reason: str = ""
    """Why, in a word or two: what drops are counted by."""
    detail: str = ""
    """Why, with the row's own figures."""
    split: str = ""
    """Which file its row goes to."""
    row: dict[str, Any] | None = None
    """As it is written."""


def dropped(item: int, name: str, scenario: str, gate: str, refusal: Refusal) -> Outcome:
    """The end of a row that did not pass a gate."""
    return Outcome(
        item=item,
        id=name,
        scenario=scenario,
        state="dropped",
        gate=gate,
        reason=refusal.reason,
        detail=" ".join(refusal.message.split())[:300],
    )
