"""The items of a build on Ray: workers that each hold a writer or engine and a sandbox of their own.

Each row is written once, by the driver. A build whose driver died goes on from what the store knows, with Ray or
without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial

from thyme.build.config import BuildConfig
from thyme.build.outcome import Outcome
from thyme.build.plan import Item, Plan
from thyme.build.run import Line, tried
from thyme.build.store import Store
from thyme.cluster import Workers

OpenLine = Callable[[], AbstractAsyncContextManager[Line]]


def run_on_ray(
    open_line: OpenLine,
    plan: Plan,
    items: Sequence[int],
    store: Store,
    config: BuildConfig,
    on_end: Callable[[Outcome | None], object],
) -> int:
    """`thyme.build.run.run_items` on the workers of a cluster.

    Args:
        open_line: what each worker opens for itself; it must see the same files.
        plan: has the items.
        items: their numbers.
        store: gets each end as it comes.
        config: workers, address, batch.
        on_end: is told of each end, and of each item that has none.

    Returns:
        How many items have no end, since a model did not answer.

    Raises:
        ValueError: Ray is not installed; a batch killed its workers again and again; what a worker raised.
    """
    size, unanswered = config.ray_batch, 0
    batches = ([plan[item] for item in items[start : start + size]] for start in range(0, len(items), size))
    with Workers(partial(_opened, open_line), config.ray_workers, config.ray_address, _said) as workers:
        for outcomes in workers.each(batches):
            for outcome in outcomes:
                if outcome is None:
                    unanswered += 1
                else:
                    store.add(outcome)
                on_end(outcome)
    return unanswered


@contextmanager
def _opened(open_line: OpenLine) -> Iterator[Callable[[Sequence[Item]], list[Outcome | None]]]:
    """A worker's line, and what makes rows of the items of a batch side by side."""
    with asyncio.Runner() as runner:
        context = open_line()
        line = runner.run(context.__aenter__())

        async def outcomes(items: Sequence[Item]) -> list[Outcome | None]:
            return list(await asyncio.gather(*(tried(line, Item(*item)) for item in items)))

        try:
            yield lambda items: runner.run(outcomes(items))
        finally:
            runner.run(context.__aexit__(None, None, None))


def _said(items: Sequence[Item]) -> str:
    return f"items {items[0].number} and up"
