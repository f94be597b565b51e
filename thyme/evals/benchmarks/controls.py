"""Controls: the same rows again, without the thing that is said to help.

The study behind them (arXiv 2606.02357) found that 96 % of what Thyme solves with tools it also solves without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thyme.evals.benchmarks.answers import Answered
from thyme.evals.benchmarks.paper_protocol import PROTOCOL_COLUMN, PaperProtocol, ProtocolFigures
from thyme.evals.benchmarks.report import mcnemar, shown_p
from thyme.evals.benchmarks.rows import Rows
from thyme.evals.benchmarks.traces import Traces
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question

TOOLS, TOOL_FREE = "tools", "tool_free"
CONTROLS = {
    TOOL_FREE: "no code can be written",
    "format_only": "code runs, but its results are withheld",
    "result_only": "no code; what the tools returned is given with the question",
    "blind": "the pictures are withheld, from the model and from its code",
    "ats_off": "code is drawn at the temperature of text",
    "base": "another model (eval.base) with the same sandbox",
}
"""Each by name, and what is different in it."""


def named(text: str) -> list[str]:
    """The controls of a list by commas; "all" is all of them.

    Raises:
        ValueError: a name that is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in (*CONTROLS, "all"):
            raise ValueError(f"control: {name!r} is none: {', '.join(CONTROLS)}, or all")
    return list(CONTROLS) if "all" in names else names


def sampling_of(control: str, sampling: Sampling) -> Sampling:
    """How rollouts are drawn under a control."""
    if control in (TOOL_FREE, "result_only"):
        return replace(sampling, allow_code=False)
    if control == "format_only":
        return replace(sampling, show_results=False)
    return replace(sampling, adaptive=False) if control == "ats_off" else sampling


class Changed:
    """Rows whose questions are changed on the way."""

    def __init__(self, rows: Rows, change: Callable[[Question], Question]) -> None:
        self.benchmark, self.items, self.left_out, self.identity = (
            rows.benchmark,
            rows.items,
            rows.left_out,
            rows.identity,
        )
        self.refuse, self.summary = rows.refuse, rows.summary
        self._rows, self._change = rows, change

    def question(self, number: int) -> Question:
        """The row's question, changed."""
        return self._change(self._rows.question(number))


def rows_of(control: str, rows: Rows, traces: Path) -> Rows:
    """The rows as a control asks them.

    Args:
        control: its name.
        rows: as they are.
        traces: of the run with tools; "result_only" takes what they returned from it.
    """
    if control == "blind":
        return Changed(rows, lambda question: replace(question, image=None, image_path="", more_images=()))
    if control == "result_only":
        returned = Traces(traces)
        return Changed(rows, lambda question: _with_results(question, returned))
    return rows


def _with_results(question: Question, traces: Traces) -> Question:
    """The question with the results of its first sample in another run: pictures behind its own, printed text below."""
    rollout = traces.last(question)
    if rollout is None:
        return question
    results = [(turn.result, turn.num_images > 0) for turn in rollout.turns if turn.result is not None]
    pictures = [picture for result, is_shown in results for picture in result.images if is_shown]
    printed = [result.stdout.strip() for result, is_shown in results if not is_shown]
    text = "".join(f"\nA tool returned: {words}" for words in printed if words)
    paths = [f"tool_{number + 1}.png" for number in range(len(pictures))]
    if question.image is None and pictures:
        (first, *pictures), (path, *paths) = pictures, paths
        question = replace(question, image=first, image_path=path)
    more = (*question.more_images, *zip(paths, pictures, strict=True))
    return replace(question, question=question.question + text, more_images=more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A control beside the run with tools, on the rows that both answered. Shares are of these rows, in percent."""

    control: str
    n: int
    accuracy: float
    """Under the control."""
    difference: float
    """Points of the control over the run with tools."""
    gained: int
    """Rows right under the control alone."""
    lost: int
    """Rows right with tools alone."""
    p: float
    """McNemar's exact p."""
    calls: float
    """Code blocks a question."""
    protocol: ProtocolFigures | None
    """What the paper's protocol did under the control; None where each row was asked once."""


def compare(
    control: str,
    answers: Mapping[str, Answered],
    tools: Mapping[str, Answered],
    protocol: PaperProtocol | None = None,
) -> Comparison:
    """A control against the run with tools.

    Args:
        control: its name.
        answers: under it.
        tools: those with tools.
        protocol: that both were asked by.

    Raises:
        ValueError: no row was answered by both.
    """
    both = [index for index in tools if index in answers]
    if not both:
        raise ValueError(f"control {control}: it answered no row that the run with tools has")
    mine, theirs = [answers[index].value for index in both], [tools[index].value for index in both]
    gained, lost, p = mcnemar(mine, theirs)
    return Comparison(
        control=control,
        n=len(both),
        accuracy=100 * sum(mine) / len(both),
        difference=100 * (sum(mine) - sum(theirs)) / len(both),
        gained=gained,
        lost=lost,
        p=p,
        calls=sum(answers[index].calls for index in both) / len(both),
        protocol=None if protocol is None else protocol.figures([answers[index] for index in both]),
    )


def solved(tool_free: Mapping[str, Answered], tools: Mapping[str, Answered]) -> dict[str, float | None]:
    """Of the rows that both answered: the share right only with tools, only without, and with both, in percent; and of
    those right with tools the share that is right without them too, None where there are none."""
    both = [index for index in tools if index in tool_free]
    with_tools = {index for index in both if tools[index].value >= 0.5}
    without = {index for index in both if tool_free[index].value >= 0.5}
    share = 100 / max(1, len(both))
    return {
        "only_with_tools": share * len(with_tools - without),
        "lost_by_tools": share * len(without - with_tools),
        "with_both": share * len(with_tools & without),
        "also_without": 100 * len(with_tools & without) / len(with_tools) if with_tools else None,
    }


def control_table(comparisons: Sequence[Comparison], shares: Mapping[str, Any] | None) -> str:
    """A Markdown table: a line a control, the run with tools first; below it what only tools solve."""
    by_protocol = any(one.protocol is not None for one in comparisons)
    columns = ["", "n", "accuracy", "against tools", "gained", "lost", "p", "calls", *[PROTOCOL_COLUMN] * by_protocol]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for one in comparisons:
        is_tools = one.control == TOOLS
        against = (
            ["", "", "", ""] if is_tools else [f"{one.difference:+.1f}", f"{one.gained}", f"{one.lost}", shown_p(one.p)]
        )
        cells = [one.control, str(one.n), f"{one.accuracy:.1f}", *against, f"{one.calls:.2f}"]
        cells += [one.protocol.shown()] if one.protocol is not None else []
        lines.append(f"| {' | '.join(cells)} |")
    if shares is not None:
        only, lost = (f"{shares[name]:.1f} %" for name in ("only_with_tools", "lost_by_tools"))
        lines += ["", f"Solved only with tools: {only}; lost by tools: {lost}."]
        if (also := shares["also_without"]) is not None:
            lines += [f"Of what is right with tools, {also:.1f} % is right without them too."]
    return "\n".join(lines) + "\n"
