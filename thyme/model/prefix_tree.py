"""Sequences that begin alike, laid out so that each common beginning is there once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Runs of packed tokens, depth first: a node stands right before all that continue it.

    A sequence is what lies on the way from a root to a node. Several roots share nothing.

    Raises:
        ValueError: nodes that are empty or not in that order.
    """

    lengths: tuple[int, ...]
    """Tokens of each node; they sum to the packed tokens."""
    parents: tuple[int, ...]
    """The node that each one continues; -1 for a root."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"prefix tree: every length must be at least 1, got {self.lengths or 'none'}")
        if len(self.parents) != len(self.lengths):
            raise ValueError(f"prefix tree: {len(self.parents)} parents for {len(self.lengths)} nodes")
        open_nodes: list[int] = []
        for node, parent in enumerate(self.parents):
            while open_nodes and open_nodes[-1] != parent:
                open_nodes.pop()
            if parent != -1 and not open_nodes:
                raise ValueError(f"prefix tree: node {node} is not right behind what node {parent} has so far")
            open_nodes.append(node)

    @property
    def starts(self) -> list[int]:
        """First packed token of each node."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def ends(self) -> list[int]:
        """Behind the last packed token of all that descends from each node."""
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        for node in reversed(range(len(ends))):
            if (parent := self.parents[node]) >= 0:
                ends[parent] = max(ends[parent], ends[node])
        return ends

    @property
    def depths(self) -> list[int]:
        """Ancestors of each node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def place_of(self, token: int) -> int:
        """Tokens before a packed token in the sequences it belongs to."""
        starts = self.starts
        node = bisect_right(starts, token) - 1
        return token - starts[node] + sum(self.lengths[above] for above in self.path(node)[:-1])

    def path(self, node: int) -> list[int]:
        """The nodes from a root to this one, both included."""
        path = list(self._upwards(node))
        return path[::-1]

    def _upwards(self, node: int) -> Iterator[int]:
        while node >= 0:
            yield node
            node = self.parents[node]
