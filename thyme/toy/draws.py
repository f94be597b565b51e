"""Random draws of the toy world: one generator an item, so that no draw is shared between kinds of data or splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from thyme.toy.config import CaptionMix, Mix, Split
from thyme.toy.pictures import COLORS

Shares = Mapping[str, float]

# The first key of every draw, so that no two kinds of data share one.
CAPTIONS, ROWS, QUESTIONS, DEMONSTRATIONS = range(4)


def generator(kind: int, seed: int, index: int, split: Split) -> np.random.Generator:
    """The generator of item `index` of a kind, seed and split.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return np.random.default_rng((kind, split == "heldout", seed, index))


def chooser(mix: Mix | CaptionMix | Shares, names: tuple[str, ...]) -> Callable[[np.random.Generator], str]:
    """A function that draws one of `names` in the shares of `mix`.

    Raises:
        ValueError: an unknown name, a negative share, or nothing to draw.
    """
    shares = dict(mix) if isinstance(mix, Mapping) else mix.as_dict()
    for name in shares:
        if name not in names:
            raise ValueError(f"mix: {name!r} is not one of {', '.join(names)}")
    weights = np.array([shares.get(name, 0.0) for name in names])
    if not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(f"mix: shares must be >= 0 and not all 0, got {shares}")
    edges = np.cumsum(weights / weights.sum())
    edges[-1] = 1.0
    return lambda rng: names[int(np.searchsorted(edges, rng.random(), side="right"))]


def draw_cell(rng: np.random.Generator, parts: int) -> tuple[int, int]:
    """Column and row of a cell in a grid of `parts` x `parts`."""
    column, row = rng.integers(parts, size=2).tolist()
    return column, row


def draw_color(rng: np.random.Generator) -> str:
    """The name of a sign's color."""
    return list(COLORS)[int(rng.integers(len(COLORS)))]
