"""The trusted side of a fork: has a session's process hold still, orders its copies, and lets it go on.

Like the rest of the client: called under its lock. Nothing that the process says is believed but that it holds still,
and one that does not spoils its own copies.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.image_store import ImageStore
from thyme.sandbox.outbox import Outbox
from thyme.sandbox.result import SandboxResult, SnippetError, Status
from thyme.sandbox.round_queue import RoundQueue
from thyme.sandbox.session_state import Copy, Fork, SessionState
from thyme.sandbox.zygote_handle import ZygoteHandle

_ORDER, _HELD, _GO_ON = b"fork", b'{"held":null}', b"go on"
_HOLD_S = 10.0
"""A process that is asked to hold still packs its files first."""
_MOST_REASON = 300


class Forks:
    """Forks under way, each a round of the session that is forked, with a round for each of its copies.

    Args:
        config: how many sessions may have a process.
        rounds: what runs.
        images: where the images of sessions lie.
        outbox: resolves futures.
        discard: ends a session's process.
    """

    def __init__(
        self,
        config: SandboxConfig,
        rounds: RoundQueue,
        images: ImageStore,
        outbox: Outbox,
        discard: Callable[[SessionState], None],
    ) -> None:
        self._config, self._rounds, self._images, self._outbox = config, rounds, images, outbox
        self._discard = discard

    def begin(self, session: SessionState, count: int, server: ZygoteHandle | None) -> Fork:
        """Starts a fork; its future comes to the states of the new sessions, or to why there are none.

        Args:
            session: between two rounds.
            count: how many.
            server: makes the copies; None where it cannot.

        Raises:
            ValueError: the session is closed or has something to run.
        """
        if session.closed:
            raise ValueError("fork: the session is closed")
        if session.round is not None or any(round_.session is session for round_ in self._rounds.waiting):
            raise ValueError("fork: the session is busy: wait for what it runs")
        fork = Fork(session, b"", count=count)
        if session.child is None and not session.had_child:  # nothing was run
            fork.copies = [self.copied(session) for _ in range(count)]
            self._outbox.put(fork.future, fork.copies)
        elif session.child is None:
            self._refuse(fork, "its process has ended")
        elif server is None:
            self._refuse(fork, "no live forks on this machine")
        elif not self._rounds.has_room(count):
            self._refuse(fork, f"no room for {count} more of max_sessions={self._config.max_sessions}")
        else:
            fork.started = time.monotonic()
            fork.deadline = fork.started + _HOLD_S
            self._rounds.occupy(session, fork)
            with contextlib.suppress(OSError):  # where it died while idle the event follows
                session.child.socket.send(_ORDER)
            self._order(fork, server, session.child.id)  # they get ready while it packs
        return fork

    def _order(self, fork: Fork, server: ZygoteHandle, original: str) -> None:
        """Orders the copies, which wait until the process holds still."""
        for _ in range(fork.count):
            copy = self.copied(fork.session)
            fork.copies.append(copy)
            fork.missing += 1
            try:
                started = self._rounds.start_copy(Copy(copy, b"", fork=fork), server, original)
            except OSError:
                started = False
            if not started:
                fork.failed = "the fork-server takes no order"
                fork.missing -= 1
                break

    def held(self, fork: Fork, frame: bytes, server: ZygoteHandle) -> bool:
        """The process answered. Has its copies made where it holds still. False where it has said so before."""
        if fork.is_held:
            return False
        if frame != _HELD:
            self._rest(fork)
            self._refuse(fork, _reason(frame))
            self._drop_copies(fork)
            return True
        fork.is_held = True
        assert fork.session.child is not None
        if not fork.failed:
            try:
                server.held(fork.session.child.id)
            except OSError:
                fork.failed = "the fork-server takes no order"
        fork.deadline = None  # from here on the copies have theirs
        for copy in fork.copies:
            if copy.round is not None and copy.round.deadline is None:
                copy.round.deadline = time.monotonic() + self._config.timeout_s
        self._look(fork)
        return True

    def came(self, copy: Copy, frame: bytes) -> None:
        """A copy answered: it is there, with nothing to do."""
        self._rounds.end_round(copy.session)
        if copy.session.child is not None:
            copy.session.child.rest()
        if frame != _HELD:
            copy.fork.failed = "a copy sent nonsense"
        copy.fork.missing -= 1
        self._look(copy.fork)

    def fell(self, copy: Copy, reason: str) -> None:
        """A copy did not come to be."""
        copy.fork.failed = reason
        copy.fork.missing -= 1
        self._look(copy.fork)

    def end(self, fork: Fork, result: SandboxResult) -> None:
        """The process that is forked is gone, or nobody wants the copies any more."""
        fork.failed = result.error.message if result.error is not None else result.status.name
        self._outbox.put(fork.future, result)
        fork.is_over = True
        self._drop_copies(fork)

    def drop(self, fork: Fork) -> None:
        """Nobody wants the copies any more."""
        fork.failed = "nobody waits for it"
        if fork.is_over:
            self._drop_copies(fork)

    def _look(self, fork: Fork) -> None:
        """Ends the fork, once the process has answered, where all copies are there or one cannot be had."""
        if fork.is_over:
            self._drop_copies(fork)
        elif not fork.is_held:
            pass
        elif fork.failed:
            self._go_on(fork)
            self._refuse(fork, fork.failed)
            self._drop_copies(fork)
        elif not fork.missing:
            self._go_on(fork)
            self._outbox.put(fork.future, fork.copies)

    def _go_on(self, fork: Fork) -> None:
        """The process that held still waits for its next snippet again."""
        if fork.session.child is not None:
            with contextlib.suppress(OSError):
                fork.session.child.socket.send(_GO_ON)
        self._rest(fork)

    def _rest(self, fork: Fork) -> None:
        fork.is_over = True
        if fork.session.round is fork:
            self._rounds.end_round(fork.session)
            if fork.session.child is not None:
                fork.session.child.rest()

    def _drop_copies(self, fork: Fork) -> None:
        for copy in fork.copies:
            copy.closed = True
            self._discard(copy)
            for stored in (copy.image, *(stored for _, stored in copy.more_images)):
                if stored is not None:
                    self._images.release(stored)
            copy.image, copy.more_images = None, ()
        fork.copies = []

    def copied(self, session: SessionState) -> SessionState:
        """A session with the images and the seed of another one, which is open; without a process."""
        if session.image is not None:
            self._images.retain(session.image)
        for _, stored in session.more_images:
            self._images.retain(stored)
        return SessionState(
            image=session.image,
            image_path=session.image_path,
            seed=session.seed,
            one_shot=False,
            more_images=session.more_images,
            had_child=session.had_child and session.child is None,
        )

    def _refuse(self, fork: Fork, reason: str) -> None:
        result = SandboxResult(status=Status.REFUSED, error=SnippetError("Refused", reason, None))
        self._outbox.put(fork.future, result)


def _reason(frame: bytes) -> str:
    """Why a process would not hold still, in its own words."""
    try:
        reason = json.loads(frame.decode())["held"]
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = None
    return reason[:_MOST_REASON] if isinstance(reason, str) else "its process sent nonsense"
