"""Boxes in pixels: what holds what, and boxes drawn around or beside another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """Left, top, right, bottom in pixels; right and bottom are not part of it."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        return self.common(other).area

    def common(self, other: Box) -> Box:
        """What both cover; of no area where they are apart."""
        return Box(max(self.x1, other.x1), max(self.y1, other.y1), min(self.x2, other.x2), min(self.y2, other.y2))

    def covers(self, other: Box) -> float:
        """The share of `other` that this box covers."""
        return self.overlap(other) / other.area if other.area else 0.0

    def inside(self, size: tuple[int, int], slack: float = 1.0) -> bool:
        """Whether it lies in a picture of (width, height), but for `slack` pixels."""
        width, height = size
        return self.x1 >= -slack and self.y1 >= -slack and self.x2 <= width + slack and self.y2 <= height + slack

    def whole(self, size: tuple[int, int]) -> Box:
        """In whole pixels of a picture of (width, height), none of it lost but what lies outside."""
        width, height = size
        x1, y1 = max(0, int(np.floor(self.x1))), max(0, int(np.floor(self.y1)))
        return Box(x1, y1, min(width, int(np.ceil(self.x2))), min(height, int(np.ceil(self.y2))))


def enlarged(box: Box, size: tuple[int, int], rng: np.random.Generator, least: float = 1.6, most: float = 3.0) -> Box:
    """A larger box that holds `box`, somewhere off its centre, in a picture of (width, height)."""
    ends = []
    for low, high, limit in ((box.x1, box.x2, size[0]), (box.y1, box.y2, size[1])):
        more = (high - low) * (rng.uniform(least, most) - 1)
        share = rng.uniform(0.2, 0.8)
        ends.append((max(0.0, low - more * share), min(float(limit), high + more * (1 - share))))
    return Box(ends[0][0], ends[1][0], ends[0][1], ends[1][1]).whole(size)


def elsewhere(box: Box, size: tuple[int, int], rng: np.random.Generator, tries: int = 200) -> Box | None:
    """A box of about the same size that shares no pixel with `box`; None where there is no room for one."""
    width, height = min(box.x2 - box.x1, size[0]), min(box.y2 - box.y1, size[1])
    for _ in range(tries):
        x, y = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
        found = Box(x, y, x + width, y + height).whole(size)
        if found.area and not found.overlap(box):
            return found
    return None
