"""Sandbox sessions as they stood after a code block, for the rollouts that branch off there: each is a live fork of the
session that ran it, and is forked again for every branch.

A session is known by its question, its seed, what it has run and what that gave: whoever was told the same can go on
from it, whichever rollout it was.
"""

from collections import OrderedDict
from collections.abc import Sequence

from thyme.rollout.types import Turn
from thyme.sandbox import Sandbox, SandboxSession
from thyme.sandbox.past import Past, digest
from thyme.sandbox.result import LIVE_FORK, holds

Key = tuple[str, int, tuple[Past, ...]]
"""Question id, seed of the session, what it has run."""


class Snapshots:
    """At most `room` sessions that nobody runs anything in; the one that was of no use for longest is closed first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._sessions: OrderedDict[Key, SandboxSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def wants(self, key: Key) -> bool:
        """Whether there is room, and none of this key yet."""
        return self._room > 0 and key not in self._sessions

    def add(self, key: Key, session: SandboxSession) -> None:
        """Keeps a session, which is closed when its room is needed."""
        while len(self._sessions) >= self._room:
            self._sessions.popitem(last=False)[1].close()
        self._sessions[key] = session

    async def fork(self, key: Key) -> SandboxSession | None:
        """A session that goes on from there, with its memory; None where there is none."""
        kept = self._sessions.get(key)
        if kept is None:
            return None
        self._sessions.move_to_end(key)
        try:
            (session,) = await kept.afork()
        except ValueError:  # an executor was left while it was forked
            return None
        if not session.fork_detail:
            return session
        session.close()  # its process was lost, or there is no room
        return None

    def close(self) -> None:
        """Closes every session."""
        while self._sessions:
            self._sessions.popitem()[1].close()


def room_for_snapshots(sandbox: Sandbox) -> int:
    """Sessions of a sandbox that may be kept without one that runs code having to wait: none where it makes no live
    forks."""
    return sandbox.config.max_sessions // 4 if holds(sandbox.layers(), LIVE_FORK) else 0


def past_of(turns: Sequence[Turn]) -> tuple[Past, ...] | None:
    """What a session that has run these rounds has run; None where its variables were lost meanwhile."""
    ran = [(turn.code, turn.result) for turn in turns if turn.code is not None and turn.result is not None]
    if any(result.restarted for _, result in ran):
        return None
    return tuple(Past(code, digest(result)) for code, result in ran)
