"""The one thread that reads from the fork-server and every child, and keeps every deadline."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from thyme.sandbox.frames import how_it_ended, read_result
from thyme.sandbox.process import FRAME_BYTES, ChildProcess, kill_process
from thyme.sandbox.result import SnippetError, Status

if TYPE_CHECKING:
    from thyme.sandbox.client import Client

_log = logging.getLogger("thyme.sandbox")
_EXIT_S = 2.0
"""After a child hung up, its exit status must follow."""
_IDLE_SWEEP_S = 1.0
_IDLE_CPU_S = 0.25


class Reader:
    """Turns what arrives, and what does not arrive in time, into calls on the client, whose lock it holds meanwhile."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.epoll = select.epoll()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watched: dict[int, ChildProcess | None] = {}
        self.sleeping_until = 0.0
        self.thread = threading.Thread(target=self._loop, name="thyme-sandbox", daemon=True)
        self.epoll.register(self.wake, select.EPOLLIN)
        self.watch(client.server.control)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread. The client is closed by now."""
        self.wake_up()
        if self.thread is not threading.current_thread():
            self.thread.join(5.0)
        self.epoll.close()
        os.close(self.wake)

    def watch(self, source: socket.socket, child: ChildProcess | None = None) -> None:
        """Listens to a child, or to the fork-server."""
        self.watched[source.fileno()] = child
        self.epoll.register(source, select.EPOLLIN)

    def unwatch(self, source: socket.socket) -> None:
        if source.fileno() in self.watched:
            del self.watched[source.fileno()]
            self.epoll.unregister(source)

    def is_watched(self, source: socket.socket) -> bool:
        return source.fileno() in self.watched

    def wake_up(self) -> None:
        os.eventfd_write(self.wake, 1)

    def wake_if_sooner(self) -> None:
        """After the client started something: the thread may be asleep beyond its deadline."""
        if (
            self.thread is not threading.current_thread()
            and self._next_deadline(time.monotonic()) < self.sleeping_until
        ):
            self.wake_up()

    def _loop(self) -> None:
        client = self.client
        while True:
            with client.lock:
                if client.closed:
                    return
                now = time.monotonic()
                self.sleeping_until = self._next_deadline(now)
                wait = min(3600.0, max(0.0, self.sleeping_until - now))
            events = self.epoll.poll(wait)
            with client.lock:
                if client.closed:
                    return
                try:
                    for fd, _ in events:
                        self._on_event(fd)
                    self._on_time(time.monotonic())
                    client.dispatch()
                except Exception as error:  # our own bug must not hang every caller
                    _log.exception("sandbox client failed")
                    client.restart(f"client error: {error}")
            client.flush()

    def _next_deadline(self, now: float) -> float:
        first, config = now + 3600.0, self.client.config
        for child in self.client.children.values():
            if child.round is not None:
                first = min(first, child.round.deadline or first)
            else:
                first = min(first, child.idle_since + config.idle_s, now + _IDLE_SWEEP_S)
        if self.client.queue and self.client.running < config.workers:
            first = min(first, now + 0.01)
        return first

    def _on_event(self, fd: int) -> None:
        if fd == self.wake:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.wake)
        elif fd == self.client.server.control.fileno():
            self._on_control()
        elif child := self.watched.get(fd):
            self._on_child(child)

    def _on_control(self) -> None:
        try:
            while received := self.client.server.receive():
                message, descriptors = received
                if "forked" in message:
                    self._on_forked(message["forked"], descriptors)
                else:
                    self._on_exited(message)
        except EOFError:
            self.client.restart("it ended")

    def _on_forked(self, id_: str, descriptors: list[int]) -> None:
        child = self.client.children.get(id_)
        if child is None:  # cancelled before it was born
            for pidfd in descriptors:
                kill_process(pidfd)
                os.close(pidfd)
        elif not descriptors:
            self.client.restart("it could not hand over a process: too many open files")
        else:
            child.is_born(descriptors[0])
            if child.round is not None:  # its limit counts from its birth
                child.round.deadline = time.monotonic() + self.client.config.timeout_s

    def _on_child(self, child: ChildProcess) -> None:
        if child.pidfd is None:
            # Its birth was told before it got its order, but this event may be older: of a descriptor since closed,
            # whose number it has.
            self._on_control()
            if self.client.children.get(child.id) is not child:
                return
        try:
            frame = child.socket.recv(FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        client, round_ = self.client, child.round
        if not frame:  # hung up; how it ended comes from the fork-server
            self.unwatch(child.socket)
            if round_ is None:
                client.discard(child)
            elif child.pidfd is not None:
                round_.deadline = min(round_.deadline or 0.0, time.monotonic() + _EXIT_S)
            return
        if round_ is None:  # nobody asked
            client.discard(child)
            return
        assert round_.started is not None
        wall_s = time.monotonic() - round_.started
        try:
            result = read_result(frame, child, round_, config=client.config, isolation=client.isolation, wall_s=wall_s)
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            message = f"the snippet's process sent nonsense: {error}"[:200]
            client.end(child, Status.CRASHED, SnippetError("ProtocolError", message, None))
        else:
            client.came_back(child, result)

    def _on_exited(self, exited: dict[str, Any]) -> None:
        client = self.client
        child = client.children.get(exited["exited"])
        if child is None:
            return
        if self.is_watched(child.socket):  # its last words may still be in the socket
            self._on_child(child)
            if client.children.get(child.id) is not child:
                return
        if child.round is None:
            client.discard(child)
        else:
            client.end(child, *how_it_ended(exited, client.config))

    def _on_time(self, now: float) -> None:
        client = self.client
        for child in list(client.children.values()):
            round_ = child.round
            if round_ is None:
                burns = child.cpu_time() - child.cpu_mark > _IDLE_CPU_S
                if burns or now >= child.idle_since + client.config.idle_s:
                    client.discard(child)
            elif round_.deadline is not None and now >= round_.deadline:
                if child.pidfd is None:
                    client.restart("it does not fork")
                    return
                if not self.is_watched(child.socket):
                    client.end(child, Status.CRASHED, SnippetError("Crash", "the process hung up", None))
                    continue
                limit = f"the code ran longer than {client.config.timeout_s:g} s"
                client.end(child, Status.TIMEOUT, SnippetError("TimeoutError", limit, None))
