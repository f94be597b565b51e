"""Robustness: the same rows with disturbed pictures, with tools and without; what is lost, and what tools win back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thyme.evals.benchmarks.answers import Answered
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.report import mcnemar, shown_p
from thyme.evals.benchmarks.rows import Rows
from thyme.evals.benchmarks.tool_use import mending
from thyme.evals.disturbances import disturbed
from thyme.rollout.types import Question

_SIDES = r"left|right|clockwise|counterclockwise|anticlockwise|mirror\w*|flip\w*|east\w*|west\w*|左|右"
_ORIENTATION = (
    _SIDES + r"|top|bottom|above|below|beneath|under|over|upper|lower|up|down|upside|north\w*|south\w*|horizontal\w*"
    r"|vertical\w*|rotat\w*|tilt\w*|upright|上|下"
)
_SPOILS = {
    "flipped": re.compile(rf"\b(?:{_SIDES})\b|[左右]", re.I),
    "rotated": re.compile(rf"\b(?:{_ORIENTATION})\b|[左右上下]", re.I),
}
"""Words of rows whose right answer is another one on the disturbed picture."""


class DisturbedRows:
    """Rows with disturbed pictures, those left out whose answer the disturbance may change (a word of sides in a row
    that is flipped).

    Args:
        rows: as they are.
        name: of `thyme.evals.disturbances.DISTURBANCES`.
        seed: of what is drawn.
        limit: rows that are looked at, the first ones; 0: all.
    """

    def __init__(self, rows: Rows, name: str, seed: int, limit: int = 0) -> None:
        self.benchmark, self.left_out = rows.benchmark, rows.left_out
        self.refuse, self.summary = rows.refuse, rows.summary
        self.identity = {**rows.identity, "disturbance": name, "disturbance_seed": seed}
        self._numbers = [n for n, item in enumerate(rows.items[: limit or None]) if keeps_its_answer(item, name)]
        self.items = [rows.items[n] for n in self._numbers]
        self._rows, self._name, self._seed = rows, name, seed

    def question(self, number: int) -> Question:
        """The row's question, disturbed."""
        return disturbed(self._rows.question(self._numbers[number]), self._name, self._seed)


def keeps_its_answer(item: Item, name: str) -> bool:
    """Whether the right answer stays right on a disturbed picture, as far as the row's words tell."""
    spoils = _SPOILS.get(name)
    words = "\n".join((item.question, item.answer, item.hint, *item.options.values()))
    return spoils is None or spoils.search(words) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """A disturbance, on the rows that all four runs answered. Accuracies in percent, losses in points."""

    disturbance: str
    n: int
    clean: float
    """Accuracy with tools on the rows as they are."""
    accuracy: float
    """Accuracy with tools on the disturbed ones."""
    lost: float
    """The first less the second."""
    p: float
    """McNemar's exact p of the loss."""
    clean_tool_free: float
    accuracy_tool_free: float
    lost_tool_free: float
    won_back: float
    """How much less is lost with tools than without."""
    failed: int
    """Calls that failed on the disturbed rows."""
    mended: float | None
    """Of them the share, in percent, whose next call in the same answer ran; None without any."""


def robustness(
    name: str,
    tools: Mapping[str, Answered],
    tool_free: Mapping[str, Answered],
    clean_tools: Mapping[str, Answered],
    clean_tool_free: Mapping[str, Answered],
) -> Robustness | None:
    """The figures of one disturbance; None where no row was answered by all four runs.

    Args:
        name: of the disturbance.
        tools, tool_free: answers on disturbed rows, by index.
        clean_tools, clean_tool_free: answers on the rows as they are.
    """
    runs = (tools, tool_free, clean_tools, clean_tool_free)
    rows = [index for index in tools if all(index in run for run in runs)]
    if not rows:
        return None
    with_tools, without, clean, clean_without = (100 * sum(run[i].value for i in rows) / len(rows) for run in runs)
    *_, p = mcnemar([tools[i].value for i in rows], [clean_tools[i].value for i in rows])
    lost, lost_without = clean - with_tools, clean_without - without
    failed, mended = mending([tools[i] for i in rows])
    return Robustness(
        disturbance=name,
        n=len(rows),
        clean=clean,
        accuracy=with_tools,
        lost=lost,
        p=p,
        clean_tool_free=clean_without,
        accuracy_tool_free=without,
        lost_tool_free=lost_without,
        won_back=lost_without - lost,
        failed=failed,
        mended=mended,
    )


def robustness_table(found: Sequence[Robustness]) -> str:
    """A Markdown table: a line a disturbance."""
    head = "| | n | with tools | lost | p | without tools | lost | won back by tools | failed calls | mended next |"
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for one in found:
        cells = [
            one.disturbance,
            str(one.n),
            f"{one.clean:.1f} to {one.accuracy:.1f}",
            f"{one.lost:+.1f}",
            shown_p(one.p),
            f"{one.clean_tool_free:.1f} to {one.accuracy_tool_free:.1f}",
            f"{one.lost_tool_free:+.1f}",
            f"{one.won_back:+.1f}",
            str(one.failed),
            "" if one.mended is None else f"{one.mended:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
