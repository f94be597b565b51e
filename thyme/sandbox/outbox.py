"""Results on their way to those who wait for them."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from typing import Any


class Outbox:
    """Filled while its lock is held, emptied without it: what waits on a future is other people's code.

    Args:
        lock: what protects the filling.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._results: list[tuple[Future[Any], Any]] = []

    def put(self, future: Future[Any], result: Any) -> None:
        """Notes what `future` will come to. The caller holds the lock and calls `flush` once it does not."""
        self._results.append((future, result))

    def flush(self) -> None:
        """Resolves every future whose result is noted, those that are noted meanwhile included."""
        while True:
            with self._lock:
                ready, self._results = self._results, []
            if not ready:
                return
            for future, result in ready:
                if not future.cancelled():
                    with contextlib.suppress(Exception):  # cancelled in this very moment
                        future.set_result(result)
