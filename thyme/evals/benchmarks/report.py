"""The figures of one benchmark: with intervals, beside the paper's, and against another run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from typing import Any

import numpy as np

from thyme.evals.benchmarks.figures import OVERALL
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.known import Benchmark
from thyme.evals.benchmarks.paper_protocol import PROTOCOL_COLUMN, ProtocolFigures
from thyme.evals.benchmarks.scorers import Scored
from thyme.evals.scoring import wilson

RESAMPLES, FEWEST_RESAMPLES, MOST_DRAWN = 1_000, 200, 2_000_000
"""Of a confidence interval; fewer where a benchmark is so long that as many rows in all would be drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What predictions amount to on a benchmark. Figures are percentages."""

    benchmark: str
    n: int
    """Rows."""
    overall: float
    low: float
    """Lower end of the 95 % interval of `overall`: percentiles over resampled rows."""
    high: float
    splits: dict[str, float]
    """By label, as the benchmark publishes them."""
    unparsed: int
    """Predictions that nothing could be made of; they count as wrong."""
    missing: int
    """Rows without a prediction; they count as wrong."""
    by_judge: int = 0
    """Rows that a judge decided."""
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Thyme-7B and Qwen2.5-VL-7B by label, as the paper has them."""
    published_by: str = "rules"
    """Whether the published figures come from rules or from a judge."""
    held: float | None = None
    """Of the answers that called a tool, those for which what came back holds what they say; None where nobody looked,
    or none called one."""
    protocol: ProtocolFigures | None = None
    """What the paper's protocol did; None where each row was asked once."""

    def to_json(self) -> dict[str, Any]:
        """Everything, by name."""
        return asdict(self)


def score_predictions(
    benchmark: Benchmark,
    items: Sequence[Item],
    predictions: Mapping[str, str],
    *,
    others: Collection[str] = (),
    unread: int = 0,
    seed: int = 0,
) -> tuple[Score, list[Scored]]:
    """Scores predictions by index, by rules alone.

    Args:
        benchmark: how they are scored.
        items: what is scored.
        predictions: by index.
        others: indices of further rows of the file, whose predictions are passed over.
        unread: rows of it whose index is not known, since they cannot be read; as many predictions may be theirs.
        seed: of the interval.

    Raises:
        ValueError: predictions for indices that the benchmark does not have; a row that its figures cannot place.
    """
    known = {item.index for item in items} | set(others)
    strange = [index for index in predictions if index not in known]
    if len(strange) > unread:
        raise ValueError(
            f"{len(strange)} predictions are for indices that {benchmark.name} does not have, such as {strange[0]!r}: "
            "is it the right file?"
        )
    scored = [
        benchmark.score(item, predictions[item.index]) if item.index in predictions else Scored(0.0, None)
        for item in items
    ]
    missing = sum(item.index not in predictions for item in items)
    return summarize(benchmark, items, scored, missing=missing, seed=seed), scored


def summarize(
    benchmark: Benchmark, items: Sequence[Item], scored: Sequence[Scored], *, missing: int = 0, seed: int = 0
) -> Score:
    """The figures of scored rows.

    Raises:
        ValueError: a row that the benchmark's figures cannot place, such as one whose index lacks its fields.
    """
    values = [one.value for one in scored]
    try:
        figures = benchmark.figures(items, values)
    except (IndexError, KeyError) as error:
        raise ValueError(f"{benchmark.name}: its rows are not of the published layout: {error!r}") from error
    low, high = interval(benchmark, items, values, seed)
    return Score(
        benchmark=benchmark.name,
        n=len(items),
        overall=figures[OVERALL],
        low=low,
        high=high,
        splits={label: figure for label, figure in figures.items() if label != OVERALL},
        unparsed=sum(one.extracted is None for one in scored) - missing,
        missing=missing,
        by_judge=sum(one.by_judge for one in scored),
        paper=dict(benchmark.paper),
        published_by=benchmark.published_by,
    )


def interval(
    benchmark: Benchmark, items: Sequence[Item], values: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """95 % of the overall figures of resampled rows; rows of one cluster are drawn together (bootstrap). Where all are
    right, or none, resampling says nothing: Wilson's interval, of as many draws as there are clusters."""
    clusters: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        clusters[benchmark.cluster(item)].append(i)
    members = list(clusters.values())
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(max(FEWEST_RESAMPLES, min(RESAMPLES, MOST_DRAWN // len(items)))):
        drawn = [i for cluster in generator.integers(len(members), size=len(members)) for i in members[cluster]]
        found.append(benchmark.figures([items[i] for i in drawn], [values[i] for i in drawn])[OVERALL])
    low, high = (float(end) for end in np.percentile(found, [2.5, 97.5]))
    if low == high and low in (0.0, 100.0):
        low, high = (100 * end for end in wilson(low / 100, len(members)))
    return low, high


def mcnemar(mine: Sequence[float], theirs: Sequence[float]) -> tuple[int, int, float]:
    """Two runs on the same rows: right here alone, right there alone, and the exact two-sided p that such a split is
    chance (McNemar's test; a row is right from one half on)."""
    gained = sum(a >= 0.5 > b for a, b in zip(mine, theirs, strict=True))
    lost = sum(b >= 0.5 > a for a, b in zip(mine, theirs, strict=True))
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n if n else 1.0
    return gained, lost, min(1.0, 2 * tail)


def shown_p(p: float) -> str:
    """A p-value as tables show it."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def table(scores: Sequence[Score]) -> str:
    """A Markdown table: a line a figure, the paper's beside ours where it has any."""
    columns = ["Benchmark", "", "n", "score", "95 %"]
    published = any(score.paper for score in scores)
    columns += ["Thyme-7B", "Qwen2.5-VL-7B"] * published
    looked_at = any(score.held is not None for score in scores)
    columns += ["evidence held"] * looked_at
    by_protocol = any(score.protocol is not None for score in scores)
    columns += [PROTOCOL_COLUMN] * by_protocol
    lines = [_line(columns), "| --- " * len(columns) + "|"]
    for score in scores:
        for label, figure in [(OVERALL, score.overall), *score.splits.items()]:
            first = label == OVERALL
            paper = [f"{one:.1f}" for one in score.paper.get(label, ())] or ["", ""]
            cells = [
                score.benchmark if first else "",
                label,
                str(score.n) if first else "",
                f"{figure:.1f}",
                f"{score.low:.1f} to {score.high:.1f}" if first else "",
                *paper * published,
                *[f"{score.held:.0f} %" if first and score.held is not None else ""] * looked_at,
                *[score.protocol.shown() if first and score.protocol is not None else ""] * by_protocol,
            ]
            lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
