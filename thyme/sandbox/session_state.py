"""What the client keeps of a session, and of each snippet that was handed to it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from thyme.sandbox.child_handle import ChildHandle
from thyme.sandbox.image_store import StoredImage


@dataclass(slots=True, eq=False, kw_only=True)
class SessionState:
    """One session. The client owns it and changes it only while it holds its lock."""

    image: StoredImage | None
    image_path: str
    """The path of the input image as the model was told it."""
    seed: int
    one_shot: bool
    """Whether its process ends with its first snippet."""
    more_images: tuple[tuple[str, StoredImage], ...] = ()
    """Further images behind the paths the model was told."""
    child: ChildHandle | None = None
    """Its process, where it has one."""
    round: Round | None = None
    """The snippet its process runs."""
    had_child: bool = False
    """Whether it ever had a process: variables may have been lost with it."""
    closed: bool = False


@dataclass(slots=True, eq=False)
class Round:
    """One snippet of a session, from the call until its future is resolved."""

    session: SessionState
    code: bytes
    future: Future[Any] = field(default_factory=Future)
    """Of a SandboxResult."""
    started: float | None = None
    """When it was handed over, with the order to fork where the session has no process; by the monotonic clock."""
    deadline: float | None = None
    """When it is ended, by the monotonic clock."""
    restarted: bool = False
    """Whether the session had lost its variables before."""
    tries: int = 0
    """How often a process was ordered for it."""


@dataclass(slots=True, eq=False)
class Fork(Round):
    """A session is forked: its process holds still. The future comes to the new sessions' states, or to a result that
    says why there are none."""

    count: int = 1
    copies: list[SessionState] = field(default_factory=list)
    missing: int = 0
    """Copies that were ordered and have not come to be."""
    is_held: bool = False
    """Whether its process said that it holds still."""
    failed: str = ""
    """Why there will be none."""
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Copy(Round):
    """A copy comes to be: what its session's process is at first."""

    fork: Fork = field(kw_only=True)
