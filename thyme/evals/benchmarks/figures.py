"""From scored rows to the figures a benchmark publishes, in percent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from thyme.evals.benchmarks.item import Item

OVERALL = "Overall"

Values = Sequence[float]
Figures = Callable[[Sequence[Item], Values], dict[str, float]]


def pooled(*columns: str) -> Figures:
    """The mean over all rows, and over those of each value of the columns ("category" where none is given)."""
    shown = columns or ("category",)

    def figures(items: Sequence[Item], values: Values) -> dict[str, float]:
        found: dict[str, float] = {}
        for column in shown:
            found |= _by((column_of(item, column) for item in items), values)
        return found | {OVERALL: _percent(values)}

    return figures


def renamed(names: Mapping[str, str]) -> Figures:
    """The mean over all rows, and over those of each category, under the names of the paper."""

    def figures(items: Sequence[Item], values: Values) -> dict[str, float]:
        found = _by((names.get(item.category, item.category) for item in items), values)
        return found | {OVERALL: _percent(values)}

    return figures


def cycles(items: Sequence[Item], values: Values) -> dict[str, float]:
    """HRBench: every question is asked once for each order of its options; the mean over orders of the mean over rows.
    FSP is one object ("single"), FCP several ("cross")."""
    names = {"single": "FSP", "cross": "FCP"}
    orders: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        orders[column_of(item, "cycle_category")].append(i)
    by_order = [
        _by((names.get(items[i].category, items[i].category) for i in rows), [values[i] for i in rows])
        | {OVERALL: _percent([values[i] for i in rows])}
        for rows in orders.values()
    ]
    # The published figures sum what each order has and divide by the number of orders.
    labels = [*dict.fromkeys(label for one in by_order for label in one if label != OVERALL), OVERALL]
    return {label: sum(one.get(label, 0.0) for one in by_order) / len(by_order) for label in labels}


def tasks(items: Sequence[Item], values: Values) -> dict[str, float]:
    """MME-RealWorld: `category` is "Task/Subtask"; every mean is over rows."""
    parts = [item.category.split("/") for item in items]
    return (
        _by(("/".join(part[:2]) for part in parts), values)
        | _by((part[0] for part in parts), values)
        | {OVERALL: _percent(values)}
    )


def hallusion(items: Sequence[Item], values: Values) -> dict[str, float]:
    """HallusionBench: right answers (aAcc), figures all of whose questions are right (fAcc), questions that are right
    on all of their figures (qAcc), and the mean of the three. The fields of `index` say which."""

    def all_right(field: int) -> float:
        groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for item, value in zip(items, values, strict=True):
            fields = item.index.split("_")
            groups[(item.more.get("l2-category", ""), fields[3], fields[field])].append(value)
        return _percent([float(all(group)) for group in groups.values()])

    found = {"aAcc": _percent(values), "fAcc": all_right(4), "qAcc": all_right(5)}
    return found | {OVERALL: fmean(found.values())}


def pairs(items: Sequence[Item], values: Values) -> dict[str, float]:
    """MMVP: rows come in pairs, one question on two pictures; a pair counts if both are right. A row whose partner is
    not there, since its picture could not be read, is in no pair."""
    both = []
    waiting: tuple[Item, float] | None = None
    for item, value in zip(items, values, strict=True):
        if waiting is not None and waiting[0].question == item.question:
            both.append(waiting[1] * value)
            waiting = None
        else:
            waiting = (item, value)
    return {"Average": _percent(values), OVERALL: _percent(both)}


def ocr(items: Sequence[Item], values: Values) -> dict[str, float]:
    """OCRBench: right answers of 1,000, as a percentage, and of its five parts."""
    recognition = "Text Recognition"
    parts = (recognition if item.category.endswith(recognition) else item.category for item in items)
    return _by(parts, values) | {OVERALL: _percent(values)}


def logic(items: Sequence[Item], values: Values) -> dict[str, float]:
    """LogicVista: by skill, several of which a question may need."""
    found = {}
    for skill in ("inductive", "deductive", "numerical", "spatial", "mechanical"):
        needing = [v for item, v in zip(items, values, strict=True) if skill in column_of(item, "skill")]
        if needing:
            found[skill] = _percent(needing)
    return found | {OVERALL: _percent(values)}


def steps(items: Sequence[Item], values: Values) -> dict[str, float]:
    """WeMath: a problem is asked whole and in its two or three steps (`key` "2steps_1", "2steps_multi"; `ID` joins
    them). Right as a whole with all steps is mastery, with a step wrong (strict) or all wrong (loose) rote; wrong as a
    whole with all steps right is worth one half. Overall is the strict score, as the paper has it."""
    problems: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for item, value in zip(items, values, strict=True):
        length, _, step = column_of(item, "key").partition("_")
        if step:
            problems[length, column_of(item, "ID") or column_of(item, "id")][step] = value > 0
    whole = [parts for parts in problems.values() if "multi" in parts and len(parts) > 1]
    if not whole:
        return {OVERALL: _percent(values)}
    of_steps = [[right for step, right in parts.items() if step != "multi"] for parts in whole]
    strict = loose = 0.0
    for parts, right in zip(whole, of_steps, strict=True):
        if parts["multi"]:
            strict += all(right)
            loose += any(right)
        elif all(right):
            strict += 0.5
            loose += 0.5
    return {"Score (Loose)": 100 * loose / len(whole), OVERALL: 100 * strict / len(whole)}


def column_of(item: Item, column: str) -> str:
    """A column's text, "" where the row has none."""
    return item.category if column == "category" else item.more.get(column, "")


def _by(labels: Iterable[str], values: Values) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for label, value in zip(labels, values, strict=True):
        if label:
            groups[label].append(value)
    return {label: _percent(group) for label, group in groups.items()}


def _percent(values: Values) -> float:
    return 100 * fmean(values) if values else 0.0
