"""Data as streams: item i is always the same item, so that a stage resumes where it stopped without any state."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Stream = Callable[[int, int], Sequence[T]]
"""(start, n) -> items start to start + n of an endless stream."""


def endless(
    items: Sequence[T], seed: int = 0, *, order: Callable[[int, int], NDArray[np.int64]] | None = None
) -> Stream[T]:
    """A stream over a finite data set: every epoch has an order of its own.

    Args:
        items: the data set.
        seed: draws the orders.
        order: (seed, epoch) -> every index once; None: any order is as likely as another.

    Raises:
        ValueError: there are no items.
    """
    if not items:
        raise ValueError("the data set is empty: there is nothing to train on")

    @lru_cache(maxsize=2)
    def drawn(epoch: int) -> NDArray[np.int64]:
        if order is not None:
            return order(seed, epoch)
        return np.random.default_rng((seed, epoch)).permutation(len(items))

    def take(start: int, n: int) -> list[T]:
        return [items[int(drawn(index // len(items))[index % len(items)])] for index in range(start, start + n)]

    return take
