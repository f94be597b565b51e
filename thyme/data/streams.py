"""Data as streams: item i is always the same item, so that a stage resumes where it stopped without any state."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Stream = Callable[[int, int], Sequence[T]]
"""(start, n) -> items start to start + n of an endless stream."""


def endless(items: Sequence[T], seed: int = 0) -> Stream[T]:
    """A stream over a finite data set: every epoch has an order of its own.

    Raises:
        ValueError: there are no items.
    """
    if not items:
        raise ValueError("the data set is empty: there is nothing to train on")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return np.random.default_rng((seed, epoch)).permutation(len(items)).tolist()

    def take(start: int, n: int) -> list[T]:
        return [items[order(index // len(items))[index % len(items)]] for index in range(start, start + n)]

    return take
