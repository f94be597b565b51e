"""Counts at every gate, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thyme.build.outcome import GATES


@dataclass(slots=True)
class Funnel:
    """How many rows came to each gate, and why others did not pass it."""

    rows: str
    """What is built: "sft" or "rl"."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Reasons by gate."""
    kept: Counter[str] = field(default_factory=Counter)
    """Rows by scenario."""
    review: Counter[str] = field(default_factory=Counter)
    """Rows that wait for a person's word, by scenario."""
    begun: Counter[str] = field(default_factory=Counter)
    """Items by scenario."""

    @staticmethod
    def of(rows: str, ends: Iterable[Mapping[str, Any]]) -> Funnel:
        """Counts what the journals say."""
        funnel = Funnel(rows, {gate: Counter() for gate in GATES[rows]})
        for end in ends:
            scenario = end["scenario"] or "-"
            funnel.begun[scenario] += 1
            if end["state"] == "dropped":
                funnel.dropped[end["gate"]][end["reason"]] += 1
            else:
                (funnel.kept if end["state"] == "kept" else funnel.review)[scenario] += 1
        return funnel

    def lines(self) -> list[str]:
        """The table, as it is printed."""
        left = self.begun.total()
        out = [f"{'gate':<12}{'in':>8}{'dropped':>9}{'left':>8}   reasons"]
        for gate, reasons in self.dropped.items():
            lost = reasons.total()
            told = ", ".join(f"{n} {why}" for why, n in reasons.most_common(4))
            told += f", {len(reasons) - 4} more" if len(reasons) > 4 else ""
            out.append(f"{gate:<12}{left:>8}{lost:>9}{left - lost:>8}   {told}".rstrip())
            left -= lost
        if self.review:
            out.append(f"{'review':<12}{left:>8}{0:>9}{self.kept.total():>8}   {self.review.total()} wait for a word")
        width = max(map(len, self.begun), default=0)
        for name, count in sorted(self.begun.items()):
            waits = f", {self.review[name]} in review" if self.review[name] else ""
            out.append(f"  {name:<{width}}  {count} rows in, {self.kept[name]} kept{waits}")
        return out

    def to_json(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "rows": self.rows,
            "begun": dict(self.begun),
            "dropped": {gate: dict(reasons) for gate, reasons in self.dropped.items()},
            "review": dict(self.review),
            "kept": dict(self.kept),
        }
