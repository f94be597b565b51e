"""One thread that calls back when a socket can be read and when a deadline has passed. It knows nothing of either."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

_LONGEST_S = 1.0
"""It looks up so often by itself: a deadline further away, as that of every new snippet is, does not have to wake it,
which costs the caller two switches of threads."""
_AFTER_ERROR_S = 0.01


class Reader:
    """Waits for sockets and deadlines on a thread of its own.

    Every callback but `afterwards` runs on that thread while it holds `lock`. Every method must be called while the
    caller holds `lock`, except `join`, which must not.

    Args:
        lock: what the callbacks and the callers of the methods share.
        on_time: called with the monotonic time after every wait; returns when to call it again at the latest.
        on_error: called with what a callback raised.
        afterwards: called without the lock before the thread waits again.
    """

    def __init__(
        self,
        lock: threading.RLock,
        *,
        on_time: Callable[[float], float],
        on_error: Callable[[Exception], None],
        afterwards: Callable[[], None],
    ) -> None:
        self._lock, self._on_time, self._on_error, self._afterwards = lock, on_time, on_error, afterwards
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, Callable[[], None]] = {}
        self._asleep_until = 0.0
        """When it wakes up by itself, 0 while it is awake."""
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="thyme-sandbox", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Has the thread end: no callback under the lock begins after this."""
        self._stopped = True
        os.eventfd_write(self._wake, 1)

    def join(self) -> None:
        """Waits until the thread has ended, if it is another and was started, and closes what it waited with."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._epoll.close()
        os.close(self._wake)

    def watch(self, source: socket.socket, on_ready: Callable[[], None]) -> None:
        """Calls `on_ready` whenever `source` can be read or has ended.

        It may also be called when there is nothing to read: the event may be one of a socket since closed, whose
        descriptor `source` got.
        """
        self._watched[source.fileno()] = on_ready
        self._epoll.register(source, select.EPOLLIN)

    def unwatch(self, source: socket.socket) -> None:
        """Ends `watch`; does nothing where it was ended before."""
        if source.fileno() in self._watched:
            del self._watched[source.fileno()]
            self._epoll.unregister(source)

    def is_watched(self, source: socket.socket) -> bool:
        """Whether `watch` was called for it and `unwatch` was not."""
        return source.fileno() in self._watched

    def wake_by(self, deadline: float) -> None:
        """Has `on_time` called by `deadline`, where the thread would sleep beyond it."""
        if deadline < self._asleep_until:
            self._asleep_until = deadline
            os.eventfd_write(self._wake, 1)

    def _loop(self) -> None:
        ready: list[int] = []
        while True:
            with self._lock:
                if self._stopped:
                    return
                self._asleep_until = 0.0
                deadline = self._turn(ready)
                self._asleep_until = min(deadline, time.monotonic() + _LONGEST_S)
            self._afterwards()
            if self._stopped:  # by a callback: what is waited with may be closed
                return
            # What `afterwards` or another thread made due sooner has written to `_wake`.
            ready = [fd for fd, _ in self._epoll.poll(max(0.0, self._asleep_until - time.monotonic()))]

    def _turn(self, ready: list[int]) -> float:
        try:
            for fd in ready:
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                elif on_ready := self._watched.get(fd):
                    on_ready()
            return self._on_time(time.monotonic())
        except Exception as error:  # a bug of the callbacks must not hang every caller
            self._on_error(error)
            return time.monotonic() + _AFTER_ERROR_S
