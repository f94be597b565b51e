"""The items of a build on Ray: workers that each hold a writer or engine and a sandbox of their own.

The driver hands out numbers of items and appends what comes back, so that each row is written once, by one process. A
worker that dies is started anew, and its batch goes to whoever is free; a driver that dies leaves what the store knows,
and the same command goes on from there, with Ray or without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from thyme.build.config import BuildConfig
from thyme.build.outcome import Outcome
from thyme.build.plan import Item, Plan
from thyme.build.run import Line, tried
from thyme.build.store import Store

_log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""A batch whose worker died so often ends the run: something in it kills workers."""

OpenLine = Callable[[], AbstractAsyncContextManager[Line]]


class Worker:
    """One Ray actor: opens its line at its first batch and keeps it.

    Args:
        open_line: opens writer, sandbox and checks; travels pickled.
        folder: the driver's working folder, which relative paths start from.
    """

    def __init__(self, open_line: OpenLine, folder: str) -> None:
        import os

        os.chdir(folder)
        self._context = open_line()
        self._line: Line | None = None
        self._opening = asyncio.Lock()

    async def outcomes(self, items: Sequence[Item]) -> list[Outcome | None]:
        """The ends of a batch, None where a model did not answer."""
        async with self._opening:
            if self._line is None:
                self._line = await self._context.__aenter__()
        line = self._line
        return list(await asyncio.gather(*(tried(line, Item(*item)) for item in items)))

    async def close(self) -> None:
        """Gives back what the line holds."""
        if self._line is not None:
            await self._context.__aexit__(None, None, None)


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
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = (
            {"address": config.ray_address} if config.ray_address else {"num_cpus": config.ray_workers}
        )
        ray.init(include_dashboard=False, log_to_driver=False, **options)
    try:
        return _handed_out(ray, open_line, plan, items, store, config, on_end)
    finally:
        if started:
            ray.shutdown()


def _handed_out(
    ray: Any,
    open_line: OpenLine,
    plan: Plan,
    items: Sequence[int],
    store: Store,
    config: BuildConfig,
    on_end: Callable[[Outcome | None], object],
) -> int:
    from pathlib import Path

    actor = ray.remote(num_cpus=1, num_gpus=_gpus(ray, config), max_restarts=0)(Worker)

    def started() -> Any:
        return actor.remote(open_line, str(Path.cwd()))

    size = config.ray_batch
    batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
    losses, unanswered = dict.fromkeys(range(len(batches)), 0), 0
    idle: list[Any] = []
    waiting, under_way = list(reversed(range(len(batches)))), dict[Any, tuple[int, Any]]()

    def hand_out(worker: Any) -> None:
        number = waiting.pop()
        under_way[worker.outcomes.remote([plan[item] for item in batches[number]])] = number, worker

    for _ in range(min(config.ray_workers, len(batches))):
        hand_out(started())
    while under_way:
        (ended,), _ = ray.wait(list(under_way), num_returns=1)
        number, worker = under_way.pop(ended)
        try:
            outcomes = ray.get(ended)
        except ray.exceptions.RayActorError as error:
            losses[number] += 1
            _log.warning("thyme: a worker died with batch %d, which is tried again: %s", number, type(error).__name__)
            if losses[number] >= MOST_LOSSES:
                first = batches[number][0]
                raise ValueError(
                    f"items {first} and up: {MOST_LOSSES} workers died with this batch: leave them out"
                ) from error
            waiting.append(number)
            worker = started()
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ValueError) else error from None
        else:
            for outcome in outcomes:
                if outcome is None:
                    unanswered += 1
                else:
                    store.add(outcome)
                on_end(outcome)
        if waiting:
            hand_out(worker)
        else:
            idle.append(worker)
    ray.get([worker.close.remote() for worker in idle])
    return unanswered


def _gpus(ray: Any, config: BuildConfig) -> float:
    """A worker's part of the cluster's GPUs; none where there are none."""
    return min(1.0, float(ray.cluster_resources().get("GPU", 0)) / config.ray_workers)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("build.ray_workers: needs Ray: pip install 'thyme[ray]'") from error
    return ray
