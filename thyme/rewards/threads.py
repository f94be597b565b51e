"""Threads beside the decoding: one with an event loop, for what waits, and one that works off calls, for what works.

Both are daemons: no reward that hangs keeps a process from ending.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""Given to what runs on a thread to end when the thread is closed."""


class LoopThread:
    """Runs coroutines until it is closed; a context manager that closes itself.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._at_close: list[Callable[[], Awaitable[None]]] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine. Its future is cancelled where the loop is closed before it ends.

        Raises:
            RuntimeError: the loop is closed.
        """
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError(f"{self._thread.name}: closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def at_close(self, end: Callable[[], Awaitable[None]]) -> None:
        """`end` is awaited on the loop when it closes, once everything else on it has ended."""
        self._at_close.append(end)

    def close(self) -> None:
        """Cancels what runs and ends the thread; one that a coroutine blocks is left behind, and the log says so."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s: blocked by a coroutine that does not await: left behind", self._thread.name)

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        finally:
            self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in self._at_close:
            await end()


class WorkThread:
    """Calls what is submitted, one after the other.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What the call gives or raises; cancelled before its turn, it is not called."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Ends the thread once it has worked off what is not cancelled; one that hangs is left behind."""
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call, work  # nothing is kept alive while it waits
