"""Runs the items of a build side by side on one event loop, each of which ends once in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from thyme.build.outcome import Outcome
from thyme.build.plan import Item, Plan
from thyme.build.store import Store
from thyme.rewards.judge import JudgeUnavailable

_log = logging.getLogger(__name__)


class Line(Protocol):
    """Makes rows of items: `Demonstrations`, `HardQuestions`."""

    async def outcome(self, item: Item) -> Outcome:
        """What becomes of an item.

        Raises:
            JudgeUnavailable: it is to be tried again.
        """


async def run_items(
    line: Line,
    plan: Plan,
    items: Iterable[int],
    store: Store,
    concurrency: int,
    on_end: Callable[[Outcome | None], object] | None = None,
) -> int:
    """Runs items to their ends.

    Args:
        line: makes rows.
        plan: has the items.
        items: their numbers.
        store: gets each end as it comes.
        concurrency: items under way at once.
        on_end: is told of each end, and of each item that has none.

    Returns:
        How many items have no end, since a model did not answer: another run tries them again.
    """
    left = iter(items)
    unanswered = 0

    async def work() -> None:
        nonlocal unanswered
        for number in left:
            ended = await tried(line, plan[number])
            if ended is None:
                unanswered += 1
            else:
                store.add(ended)
            if on_end is not None:
                on_end(ended)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except BaseExceptionGroup as failed:  # the first says what is wrong, the others that they were cancelled
        raise failed.exceptions[0] from failed
    return unanswered


async def tried(line: Line, item: Item) -> Outcome | None:
    """The end of an item, None where a model did not answer; the log says which."""
    try:
        return await line.outcome(item)
    except JudgeUnavailable as error:
        _log.warning("thyme: item %d has no end yet: %s", item.number, error)
        return None
