"""No rank waits for ever: phases have deadlines, and a rank that dies takes the others of its machine with it.

A collective whose other end is gone may wait for hours, and says nothing of who is missing. A thread of each rank
watches the clock and the other processes, and ends its own process with one line that names the phase, and the rank
that is gone; torchrun then ends the rest.
"""

from __future__ import annotations

import faulthandler
import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

EXIT_CODE = 3
"""Of a process that its watchdog ended."""
BACKSTOP_S = 30.0
"""After the deadline; then C code that never lets Python run is ended without a word on who and where."""
GRACE_S = 2.0
"""A broken connection is blamed on a rank that dies within this time."""


class Watchdog:
    """Use as a context; an error that leaves it is held back a moment, lest a rank's death be the cause.

    Args:
        deadlines: seconds by phase; a phase that is not named may take any time.
        rank: of this process, for what is printed.
        peers: (host name, process id) by rank. Those on this host are watched, and this process ends when one of them
            does; the others are known by their broken connections only.
    """

    def __init__(
        self, deadlines: Mapping[str, float] | None = None, *, rank: int = 0, peers: Sequence[tuple[str, int]] = ()
    ) -> None:
        self._deadlines = dict(deadlines or {})
        self._rank, self._several = rank, len(peers) > 1
        self._phases: list[tuple[str, float | None]] = []
        self._failed = ""
        """The innermost phase that an error is leaving: a rank's death may show as one before it shows as itself."""
        self._closing = False
        self._resources = ExitStack()
        self._wake = os.eventfd(0)
        self._resources.callback(os.close, self._wake)
        self._ranks: dict[int, tuple[int, int]] = {}
        for peer, (host, pid) in enumerate(peers):
            if peer != rank and host == os.uname().nodename:
                handle = os.pidfd_open(pid)
                self._resources.callback(os.close, handle)
                self._ranks[handle] = (peer, pid)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While the block runs, the deadline of `name` counts; the one around it goes on after it."""
        limit = self._deadlines.get(name)
        self._set([*self._phases, (name, None if limit is None else time.monotonic() + limit)])
        try:
            yield
        except BaseException:
            self._failed = self._failed or name
            raise
        else:
            self._failed = ""
        finally:
            self._set(self._phases[:-1])

    def close(self) -> None:
        """Watches no longer. To be called before ranks leave in their own time."""
        if self._thread.is_alive():
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        self._resources.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and self._ranks and self._thread.is_alive():
            self._thread.join(GRACE_S)
        self.close()

    def _set(self, phases: list[tuple[str, float | None]]) -> None:
        self._phases = phases
        deadline = self._deadline()
        if deadline is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            left = max(deadline - time.monotonic(), 0.0)
            faulthandler.dump_traceback_later(left + BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)
        os.eventfd_write(self._wake, 1)

    def _deadline(self) -> float | None:
        deadlines = [deadline for _, deadline in self._phases if deadline is not None]
        return min(deadlines) if deadlines else None

    def _watch(self) -> None:
        poll = select.poll()
        for handle in (self._wake, *self._ranks):
            poll.register(handle, select.POLLIN)
        while not self._closing:
            deadline = self._deadline()
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            ready = {handle for handle, _ in poll.poll(None if left is None else left * 1e3)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for handle in ready & self._ranks.keys():
                peer, pid = self._ranks[handle]
                self._end(f"rank {peer} (process {pid}) has ended: this rank cannot go on")
            if deadline is not None and deadline == self._deadline() and time.monotonic() >= deadline:
                self._expire(deadline)

    def _expire(self, deadline: float) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        name = next(name for name, at in self._phases if at == deadline)
        self._end(
            f"over its deadline of {self._deadlines[name]:g} s (distributed.{name}_deadline_s); what every thread was "
            "doing stands above"
        )

    def _end(self, what: str) -> None:
        if self._closing:
            return
        name = self._phases[-1][0] if self._phases else self._failed
        where = f"phase {name}" if name else "between phases"
        who = f"rank {self._rank}, " if self._several else ""
        os.write(2, f"thyme: {who}{where}: {what}\n".encode())
        os._exit(EXIT_CODE)
