"""Which snippet starts next: rounds that wait, and the sessions whose processes take or may take them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from thyme.sandbox.child_handle import ChildHandle
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.protocol import Order
from thyme.sandbox.session_state import Copy, Round, SessionState
from thyme.sandbox.zygote_handle import ZygoteHandle

_FORK_S = 5.0
"""A child that is not there by then means a stuck fork-server."""
_RETRY_S = 0.01
"""How soon what waits is tried again: the fork-server may not have taken an order, a session may have become free."""
_IDLE_SWEEP_S = 1.0
"""How often idle processes are looked at for what they burn."""
_NEVER_S = 3600.0


class RoundQueue:
    """Rounds in the order in which they came, and what may run at once. Every call needs the client's lock.

    Args:
        config: how many snippets run at once, how many sessions have a process.
        on_child: called with every session that gets a process, before the process is told what to run.
    """

    def __init__(self, config: SandboxConfig, on_child: Callable[[SessionState], None]) -> None:
        self.waiting: deque[Round] = deque()
        self.live: dict[str, SessionState] = {}
        """Sessions that have a process, by its id."""
        self.num_running = 0
        self._config, self._on_child = config, on_child
        self._num_ordered = 0

    def has_work(self) -> bool:
        """Whether a round waits and one more may run, though its own session may not be free."""
        return bool(self.waiting) and self.num_running < self._config.workers

    def start_waiting(self, server: ZygoteHandle) -> list[tuple[Round, str]]:
        """Starts whatever may start now, first come first served.

        A round whose session is busy, or for whose process there is no room, lets others pass. Where the fork-server
        takes no order now, what is left waits for the next call.

        Returns:
            The rounds that cannot be started for want of resources, each with the reason.
        """
        failed: list[tuple[Round, str]] = []
        skipped: list[Round] = []
        busy: set[SessionState] = set()
        while self.has_work():
            round_ = self.waiting.popleft()
            if round_.session in busy or not self._may_start(round_.session):
                busy.add(round_.session)
                skipped.append(round_)
                continue
            try:
                started = self._start(round_, server)
            except OSError as error:
                failed.append((round_, f"the sandbox is out of resources: {error}"))
                continue
            if not started:
                self.waiting.appendleft(round_)
                break
        self.waiting.extendleft(reversed(skipped))
        return failed

    def next_deadline(self, now: float) -> float:
        """When a process must be looked at or a waiting round be tried again, at the latest; by the monotonic clock."""
        first = now + (_RETRY_S if self.has_work() else _NEVER_S)
        for session in self.live.values():
            assert session.child is not None
            if session.round is not None:
                first = min(first, session.round.deadline or first)
            else:
                first = min(first, session.child.idle_since + self._config.idle_s, now + _IDLE_SWEEP_S)
        return first

    def take_back(self, round_: Round) -> bool:
        """Removes a round that waits; False where it does not."""
        if round_ not in self.waiting:
            return False
        self.waiting.remove(round_)
        return True

    def take_back_all(self, session: SessionState | None = None) -> list[Round]:
        """Removes the rounds of `session` that wait, or all."""
        taken = [round_ for round_ in self.waiting if session in (None, round_.session)]
        self.waiting = deque(round_ for round_ in self.waiting if session not in (None, round_.session))
        return taken

    def has_room(self, count: int) -> bool:
        """Whether so many more sessions may have a process now."""
        return self._num_sessions() + count <= self._config.max_sessions

    def occupy(self, session: SessionState, round_: Round) -> None:
        """The session's process has something to do."""
        session.round = round_
        self.num_running += 1

    def start_copy(self, copy: Copy, server: ZygoteHandle, original: str) -> bool:
        """Orders a process that is the copy of another one; False where the fork-server takes no order now.

        Args:
            copy: what its session does until it is there.
            server: makes it.
            original: the id of the process that is copied.

        Raises:
            OSError: no descriptor is left.
        """
        session, now = copy.session, time.monotonic()
        child = self._ordered(session, server, original)
        if child is None:
            return False
        session.had_child = True
        child.idle_since = now
        copy.started, copy.deadline = now, now + _FORK_S
        self.occupy(session, copy)
        return True

    def _ordered(self, session: SessionState, server: ZygoteHandle, original: str | None = None) -> ChildHandle | None:
        """The session's process, ordered a moment ago; None where the fork-server takes no order now."""
        self._num_ordered += 1
        child = ChildHandle(self._num_ordered, self._config)
        if not _order(child, session, server, original):
            child.close()
            return None
        session.child = child
        self.live[child.id] = session
        self._on_child(session)
        return child

    def end_round(self, session: SessionState) -> None:
        """The session's process runs nothing any more."""
        if session.round is not None:
            session.round = None
            self.num_running -= 1

    def forget(self, session: SessionState) -> ChildHandle | None:
        """Parts a session from its process, which the caller closes; None where it has none."""
        child = session.child
        if child is None:
            return None
        self.end_round(session)
        del self.live[child.id]
        session.child = None
        return child

    def _may_start(self, session: SessionState) -> bool:
        if session.child is not None:
            return session.round is None
        return session.one_shot or self._num_sessions() < self._config.max_sessions

    def _num_sessions(self) -> int:
        return sum(not session.one_shot for session in self.live.values())

    def _start(self, round_: Round, server: ZygoteHandle) -> bool:
        session, now, limit = round_.session, time.monotonic(), self._config.timeout_s
        child = session.child
        if child is None:
            child = self._ordered(session, server)
            if child is None:
                return False
            round_.restarted = session.had_child
            session.had_child = True
            round_.tries += 1
            limit = _FORK_S
        round_.started, round_.deadline = now, now + limit
        child.send(round_.code)
        self.occupy(session, round_)
        return True


def _order(child: ChildHandle, session: SessionState, server: ZygoteHandle, original: str | None) -> bool:
    """Sends the order to fork; False where it cannot be sent now."""
    image = session.image
    order = Order(
        id=child.id,
        image_path=session.image_path,
        image_file=Path(image.file).name if image else None,
        image_format=image.format if image else None,
        more_images=[(path, Path(stored.file).name) for path, stored in session.more_images],
        seed=session.seed,
        fork_of=original,
    )
    with child.far_end, child.pixels.far_end:
        try:
            server.fork(order, [child.stdout, child.far_end.fileno(), child.pixels.far_end.fileno(), child.code])
        except OSError:  # full, or the server is gone: its end of file is on the way and restarts it
            return False
    return True
