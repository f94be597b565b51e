"""What the runs of an ablation come to: means over seeds, intervals, differences by seed. Standard library only.

An interval is Student's, mean +- t s / sqrt(n) over n runs: it takes the runs' figures to be normal and their seeds to
be the only thing that differs. Arms are compared within each seed, which takes out what a seed does to all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

# Quantiles of 97.5 % by degrees of freedom, from 1 on; beyond 30 the last one, which is a little wide.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over runs."""

    mean: float
    half_width: float | None
    """Of the 95 % interval; None of a single run."""
    n: int
    """Runs."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """None of no value."""
        if not values:
            return None
        n = len(values)
        half = _STUDENT[min(n - 1, len(_STUDENT)) - 1] * stdev(values) / sqrt(n) if n > 1 else None
        return cls(mean=fmean(values), half_width=half, n=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """One metric of one arm."""

    arm: str
    by_seed: tuple[float | None, ...]
    """In the order of the seeds; None where the run has no such metric."""
    estimate: Estimate | None
    difference: Estimate | None
    """To the first arm, over the seeds that both have; None for the first arm itself, and where there is no such
    seed."""


def last_value(rows: Sequence[Mapping[str, Any]], metric: str, last: int) -> float | None:
    """A run's figure: the mean of the metric over those of its last `last` steps that have it; None where none has."""
    found = [float(row[metric]) for row in rows[-last:] if metric in row]
    return fmean(found) if found else None


def compared(values: Mapping[str, Sequence[float | None]]) -> list[ArmFigures]:
    """The figures of each arm: arm -> value of each seed, the first arm being what the others are compared with."""
    first = next(iter(values.values()))
    found = []
    for place, (arm, by_seed) in enumerate(values.items()):
        pairs = [(a, b) for a, b in zip(by_seed, first, strict=True) if a is not None and b is not None]
        found.append(
            ArmFigures(
                arm=arm,
                by_seed=tuple(by_seed),
                estimate=Estimate.of([value for value in by_seed if value is not None]),
                difference=Estimate.of([a - b for a, b in pairs]) if place else None,
            )
        )
    return found
