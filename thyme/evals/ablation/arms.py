"""The arms of an ablation: every combination of what is varied. Standard library only."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of running a recipe."""

    name: str
    """How tables call it: the values that tell it from the others."""
    slug: str
    """The same as part of a folder's name, unique among the arms."""
    values: tuple[tuple[str, str], ...]
    """(dotted key, value as the command line would say it)."""


def arms_of(varied: Sequence[str]) -> list[Arm]:
    """The arms of `KEY=V1,V2,...`; of several such, all combinations, the last one varying fastest.

    Keys that go together are joined by +, and so are their values: "KEY+OTHER=V1+W1,V2+W2".

    Raises:
        ValueError: nothing is varied, a text that is not so, a key that is varied twice, two equal arms.
    """
    if not varied:
        raise ValueError("vary: nothing is varied: say --vary KEY=V1,V2")
    axes = [_axis(text) for text in varied]
    keys = [key for axis in axes for key, _ in axis[0]]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"vary: {twice} is varied twice")
    arms: list[Arm] = []
    for combination in itertools.product(*axes):
        values = tuple(pair for point in combination for pair in point)
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(value for _, value in values))
        if any(arm.values == values for arm in arms):
            raise ValueError(f"vary: {dict(values)} occurs twice")
        if any(arm.slug == slug for arm in arms):
            slug = f"{slug}_{len(arms)}"
        short = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values)
        arms.append(Arm(name=short, slug=slug, values=values))
    return arms


def _axis(text: str) -> list[tuple[tuple[str, str], ...]]:
    joined, has_values, listed = text.partition("=")
    keys, points = joined.replace("-", "_").split("+"), listed.split(",")
    if not has_values or not all(keys) or not all(points):
        raise ValueError(f"vary: {text!r}: expected KEY=V1,V2 (keys that go together: KEY+OTHER=V1+W1,V2+W2)")
    axis = []
    for point in points:
        values = point.split("+")
        if len(values) != len(keys):
            raise ValueError(f"vary: {text!r}: {point!r} has {len(values)} values for {len(keys)} keys")
        axis.append(tuple(zip(keys, values, strict=True)))
    return axis
