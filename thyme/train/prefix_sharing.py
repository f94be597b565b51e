"""Which tokens of a batch are the same, so that a forward pass computes each of them once.

Two samples share a token where all up to it is equal: ids, M-RoPE positions and pictures. Then its hidden states are
equal too, whatever comes after it, and one computation serves both, its gradient the sum of theirs. What is shared is
found in the tokens themselves: the rollouts of a question share its prompt, those that agreed for longer (branches of
one rollout, greedy rounds) that too, and questions what their prompts begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from thyme.model.prefix_tree import PrefixTree

Keys = NDArray[np.int64]
"""[T, 5]: what makes a token, all before it being equal: id, time, row, column, and which picture, or -1."""


@dataclass(slots=True, eq=False)
class _Node:
    keys: Keys
    parent: _Node | None
    children: dict[bytes, _Node] = field(default_factory=dict)
    """By the key of their first token."""


class Trie:
    """The distinct tokens of sequences, as runs that are cut where sequences part or end."""

    def __init__(self) -> None:
        self._root = _Node(np.empty((0, 5), dtype=np.int64), None)
        self._lasts: list[_Node] = []
        self.size = 0
        """Distinct tokens."""

    def shared(self, keys: Keys) -> int:
        """How many of the first tokens are there."""
        node, at = self._root, 0
        while at < len(keys) and (child := node.children.get(keys[at].tobytes())) is not None:
            equal = _common(child.keys, keys[at:])
            at += equal
            if equal < len(child.keys):
                break
            node = child
        return at

    def insert(self, keys: Keys) -> None:
        """Adds a sequence, of at least one token."""
        node, at = self._root, 0
        while at < len(keys):
            first = keys[at].tobytes()
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = _Node(keys[at:], node)
                self.size += len(child.keys)
            equal = _common(child.keys, keys[at:])
            if equal < len(child.keys):  # the lower part stays the node that it was, for those that end in it
                upper = node.children[first] = _Node(child.keys[:equal], node)
                child.keys, child.parent = child.keys[equal:], upper
                upper.children[child.keys[0].tobytes()] = child
                child = upper
            node, at = child, at + equal
        self._lasts.append(node)

    def layout(self) -> tuple[PrefixTree, list[NDArray[np.int64]]]:
        """The tree of all runs, depth first, and the packed token of each sequence's tokens, in the order they came."""
        places: dict[int, NDArray[np.int64]] = {id(self._root): np.empty(0, dtype=np.int64)}  # of all up to a node
        numbers = {id(self._root): -1}
        lengths: list[int] = []
        parents: list[int] = []
        total = 0
        waiting = list(self._root.children.values())[::-1]
        while waiting:
            node = waiting.pop()
            assert node.parent is not None
            numbers[id(node)] = len(lengths)
            lengths.append(len(node.keys))
            parents.append(numbers[id(node.parent)])
            own = np.arange(total, total + len(node.keys))
            places[id(node)] = np.concatenate([places[id(node.parent)], own])
            total += len(node.keys)
            waiting += list(node.children.values())[::-1]
        return PrefixTree(tuple(lengths), tuple(parents)), [places[id(node)] for node in self._lasts]


def micro_batches(
    keys: Sequence[Keys], trained: Sequence[int], groups: Sequence[int | None], max_tokens: int | None
) -> list[list[int]]:
    """Cuts sequences, in order, into micro-batches of at most `max_tokens` distinct tokens and as many trained ones.

    A group that fits into a micro-batch is not cut. A sequence longer than `max_tokens` gets one of its own.

    Args:
        keys: of each sequence.
        trained: tokens that are trained of each, shared ones too.
        groups: which one each belongs to, neighbors of each other; None: it is one by itself.
        max_tokens: None: all in one.

    Returns:
        The sequences' indices by micro-batch.
    """
    limit = max_tokens or sum(map(len, keys))
    out: list[list[int]] = []
    trie, rows = Trie(), 0
    for group in _runs(groups):
        alone = Trie()
        for i in group:
            alone.insert(keys[i])
        added = alone.size - max(trie.shared(keys[i]) for i in group)
        fits = trie.size + added <= limit and rows + sum(trained[i] for i in group) <= limit
        for i in group:
            over = trie.size + len(keys[i]) - trie.shared(keys[i]) > limit or rows + trained[i] > limit
            if not out or over or (i == group[0] and not fits):
                out.append([])
                trie, rows = Trie(), 0
            out[-1].append(i)
            trie.insert(keys[i])
            rows += trained[i]
    return out


def distinct_tokens(keys: Sequence[Keys]) -> int:
    """Tokens of the sequences without those that another one has already: what must be computed at least.

    Counted by another way than `Trie`: in lexical order, each sequence adds what it does not share with the one before.
    """
    ordered = sorted(keys, key=lambda k: (k + 1).astype(">i8").tobytes())
    return sum(map(len, ordered)) - sum(_common(a, b) for a, b in pairwise(ordered))


def _runs(groups: Sequence[int | None]) -> list[list[int]]:
    """Indices of neighbors of one group."""
    runs = groupby(range(len(groups)), key=lambda i: (-1, i) if groups[i] is None else (groups[i], 0))
    return [list(run) for _, run in runs]


def _common(a: Keys, b: Keys) -> int:
    """Tokens at the beginning in which both are equal."""
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).any(axis=1)
    return int(differs.argmax()) if differs.any() else length
