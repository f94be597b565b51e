"""Batches of work on Ray: workers that each open what they need at their first batch, and keep it.

The driver hands out batches and gets back what became of each, so that it alone writes, and writes everything once. A
worker that dies is started anew, and its batch goes to whoever is free; a driver that dies leaves what it has written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""A batch whose worker died so often ends the run: something in it kills workers."""

Batch = TypeVar("Batch")
Done = TypeVar("Done")


class Worker(Generic[Batch, Done]):
    """One Ray actor: opens its work at its first batch and keeps it.

    Args:
        open_work: opens what does a batch; travels pickled.
        folder: the driver's working folder, which relative paths start from.
    """

    def __init__(self, open_work: Callable[[], AbstractContextManager[Callable[[Batch], Done]]], folder: str) -> None:
        os.chdir(folder)
        self._open = open_work
        self._opened = ExitStack()
        self._work: Callable[[Batch], Done] | None = None

    def do(self, batch: Batch) -> Done:
        """What becomes of a batch."""
        if self._work is None:
            self._work = self._opened.enter_context(self._open())
        return self._work(batch)

    def close(self) -> None:
        """Gives back what was opened."""
        self._opened.close()


class Workers(Generic[Batch, Done]):
    """Workers of a Ray cluster, from the first batch to the end of the block.

    Args:
        open_work: what each opens for itself; it must see the same files.
        count: of workers.
        address: of a Ray cluster, such as "auto"; "": one on this machine, for the time of the block.
        said: names a batch in messages.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(
        self,
        open_work: Callable[[], AbstractContextManager[Callable[[Batch], Done]]],
        count: int,
        address: str = "",
        said: Callable[[Batch], str] = str,
    ) -> None:
        self._open_work, self._count, self._said = open_work, count, said
        self._ray = _ray()
        self._idle: list[Any] = []
        self._has_started = not self._ray.is_initialized()
        if self._has_started:
            options: dict[str, Any] = {"address": address} if address else {"num_cpus": count}
            try:
                # What Ray says of itself at each start is no part of a verb's output.
                self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
            except ConnectionError as error:
                raise ValueError(f"ray_address: {address}: no Ray cluster there: {error}") from None
        share = min(1.0, float(self._ray.cluster_resources().get("GPU", 0)) / count)  # of the cluster's GPUs
        self._actor = self._ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(Worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._ray.get([worker.close.remote() for worker in self._idle])
        finally:
            if self._has_started:
                self._ray.shutdown()

    def each(self, batches: Iterable[Batch]) -> Iterator[Done]:
        """What becomes of each batch, in the order in which they end.

        Args:
            batches: are asked for as workers are free.

        Raises:
            ValueError: a batch killed its workers again and again.
            Exception: what the work raised.
        """
        ray, left = self._ray, ((batch, 0) for batch in batches)
        again: list[tuple[Batch, int]] = []
        under_way: dict[Any, tuple[Batch, int, Any]] = {}
        while True:
            while len(under_way) < self._count:
                found = again.pop() if again else next(left, None)
                if found is None:
                    break
                batch, losses = found
                worker = self._idle.pop() if self._idle else self._actor.remote(self._open_work, str(Path.cwd()))
                under_way[worker.do.remote(batch)] = batch, losses, worker
            if not under_way:
                return
            (ended,), _ = ray.wait(list(under_way), num_returns=1)
            batch, losses, worker = under_way.pop(ended)
            try:
                done: Done = ray.get(ended)
            except ray.exceptions.RayActorError as error:
                what, losses = self._said(batch), losses + 1
                _log.warning("thyme: a worker died with %s, tried again: %s", what, type(error).__name__)
                if losses >= MOST_LOSSES:
                    raise ValueError(f"{what}: {MOST_LOSSES} workers died with this batch: leave it out") from error
                again.append((batch, losses))
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, (ValueError, OSError, RuntimeError)) else error from None
            else:
                self._idle.append(worker)
                yield done


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("ray_workers: needs Ray: pip install 'thyme[ray]'") from error
    return ray
