"""The trusted side: queues snippets, hands them to jailed children, and resolves what callers wait for.

Callers only enqueue and wait on a future, so the synchronous and the asyncio face are the same thing; one thread
(reader.py) waits for what children and fork-server send, and for all deadlines. A child that misbehaves is killed
through its pidfd, which works even when the fork-server is stuck; a fork-server that dies or stalls is replaced, and
what had not started is queued again. Nothing a child sends is unpickled, decoded as an image, or believed beyond its
own snippet.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from thyme.sandbox.cgroup import Group
from thyme.sandbox.child_handle import FRAME_BYTES, ChildHandle, kill_process
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.forking import Forks
from thyme.sandbox.image_store import ImageStore, StoredImage
from thyme.sandbox.outbox import Outbox
from thyme.sandbox.paths import place_of
from thyme.sandbox.reader import Reader
from thyme.sandbox.result import (
    LIVE_FORK,
    Layer,
    SandboxResult,
    SandboxUnavailable,
    SnippetError,
    Status,
    holds,
)
from thyme.sandbox.round_queue import RoundQueue
from thyme.sandbox.run_folder import make_run_folder, remove_run_folder
from thyme.sandbox.session_state import Copy, Fork, Round, SessionState
from thyme.sandbox.untrusted_result import how_it_ended, read_result
from thyme.sandbox.zygote_handle import ZygoteHandle

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("thyme.sandbox")
MOST_MORE_IMAGES = 31
"""Images of a session beside its first."""

_MAX_TRIES = 2
_EXIT_S = 2.0
"""After a child hung up, its exit status must follow."""
_IDLE_CPU_S = 0.25
"""A process between two snippets that burns more than this is ended."""


class Client:
    """Owner of the fork-server, of the queue and of every session's state. Each public method, unless it says
    otherwise, may be called from any thread."""

    def __init__(self, config: SandboxConfig, off: frozenset[str]) -> None:
        self.config, self.off = config, off
        self.lock = threading.RLock()
        self.closed = False
        self.broken: SandboxUnavailable | None = None
        self.restarts = 0
        self.outbox = Outbox(self.lock)
        self.rounds = RoundQueue(config, self._listen)
        self.run_dir = make_run_folder()
        self.group = Group(config, off)
        try:
            self.images = ImageStore(self.run_dir / "images")
            self.forks = Forks(config, self.rounds, self.images, self.outbox, self._discard)
            self._start()
            self.reader = Reader(
                self.lock, on_time=self._on_time, on_error=self._on_own_error, afterwards=self.outbox.flush
            )
            self.reader.watch(self.server.control, self._on_control)
        except BaseException:
            if hasattr(self, "server"):
                self.server.stop()
            self._release()
            raise
        self.reader.start()
        _live.add(self)

    # --- callers -----------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What isolates here; see Sandbox.layers."""
        return self.server.layers

    @property
    def isolation(self) -> str:
        """What isolates here in a word; see Sandbox.isolation."""
        return self.server.isolation

    def open_session(
        self,
        image: Image.Image | str | os.PathLike[str] | None,
        image_path: str,
        seed: int,
        *,
        one_shot: bool,
        more_images: Sequence[tuple[str, Image.Image | str | os.PathLike[str]]] = (),
    ) -> SessionState:
        """A session without a process; its first snippet brings one.

        Args:
            image: the input image, stored until the session is closed.
            image_path: the path the model was told.
            seed: of what snippets draw at random.
            one_shot: whether the process ends with the first snippet.
            more_images: further images, each behind the path the model was told.

        Raises:
            ValueError: an image cannot be read; further ones without a first, too many, or two under one path.
        """
        told = [image_path, *(path for path, _ in more_images)]
        if more_images and (image is None or len(more_images) > MOST_MORE_IMAGES):
            raise ValueError(f"more_images: {len(more_images)}, behind a first image, at most {MOST_MORE_IMAGES}")
        if len({place_of(path) for path in told}) < len(told):
            raise ValueError(f"more_images: two images at one path among {', '.join(told)}: each needs its own")
        stored: list[StoredImage] = []
        try:
            stored += [] if image is None else [self.images.acquire(image)]
            for _, more in more_images:
                stored.append(self.images.acquire(more))
        except BaseException:
            for one in stored:
                self.images.release(one)
            raise
        return SessionState(
            image=stored[0] if stored else None,
            image_path=image_path,
            seed=seed,
            one_shot=one_shot,
            more_images=tuple(zip(told[1:], stored[1:], strict=True)),
        )

    def submit(self, session: SessionState, code: str) -> Round:
        """Queues one snippet; its future always comes to a result."""
        content = code.encode("utf-8", "replace")
        round_ = Round(session, content)
        round_.future.add_done_callback(lambda f: self.cancel(round_) if f.cancelled() else None)
        with self.lock:
            if self.closed or session.closed:
                self._refuse(round_, "the session is closed" if session.closed else "the sandbox is closed")
            elif self.broken is not None:
                self._refuse(round_, str(self.broken))
            elif len(content) > self.config.max_code_bytes:
                self._refuse(round_, f"the code has {len(content)} bytes, more than {self.config.max_code_bytes}")
            else:
                self.rounds.waiting.append(round_)
                self._dispatch()
        self.outbox.flush()
        return round_

    def fork(self, session: SessionState, count: int) -> Fork:
        """Starts a fork of a session; see Forks.begin.

        Raises:
            ValueError: as that does, and where the sandbox is closed.
        """
        with self.lock:
            if self.closed:
                raise ValueError("fork: the sandbox is closed")
            copies = self.broken is None and holds(self.layers, LIVE_FORK)
            fork = self.forks.begin(session, count, self.server if copies else None)
            fork.future.add_done_callback(lambda f: self._drop(fork) if f.cancelled() else None)
            self._dispatch()
        self.outbox.flush()
        return fork

    def _drop(self, fork: Fork) -> None:
        with self.lock:
            self.forks.drop(fork)

    def reopen(self, session: SessionState) -> SessionState:
        """A session with the images and the seed of another one, which is open, and nothing else."""
        with self.lock:
            return self.forks.copied(session)

    def cancel(self, round_: Round) -> None:
        """Takes a snippet back; one that runs is killed."""
        with self.lock:
            self.rounds.take_back(round_)
            if round_.session.round is round_:
                self._discard(round_.session)
            if not self.closed:
                self._dispatch()
        self.outbox.flush()

    def close_session(self, session: SessionState) -> None:
        """Ends the session's process; what it has queued or running is REFUSED."""
        images: list[StoredImage] = []
        with self.lock:
            session.closed = True
            for round_ in self.rounds.take_back_all(session):
                self._refuse(round_, "the session was closed")
            if session.round is not None:
                self._refuse(session.round, "the session was closed while its code ran")
            self._discard(session)
            if not self.closed:
                images = [stored for _, stored in session.more_images]
                images += [] if session.image is None else [session.image]
                session.image, session.more_images = None, ()
                self._dispatch()
        for image in images:
            self.images.release(image)
        self.outbox.flush()

    def close(self) -> None:
        """Kills what runs, ends the fork-server, deletes every scratch folder. Twice is fine."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            self.reader.stop()
            for round_ in self.rounds.take_back_all():
                self._refuse(round_, "the sandbox was closed")
            for session in list(self.rounds.live.values()):
                if session.round is not None:
                    self._refuse(session.round, "the sandbox was closed")
                self._discard(session)
        self.reader.join()
        self.server.stop()
        self._release()
        self.outbox.flush()
        _live.discard(self)

    def abandon(self) -> None:
        """In a fork of this process: let go of the descriptors, so that the server notices when the original ends."""
        self.closed = True
        self.lock = threading.RLock()  # a thread that is not here may have held it
        self.outbox = Outbox(self.lock)
        self.images.abandon()
        self.server.control.close()
        for session in self.rounds.live.values():
            if session.child is not None:
                session.child.close()
            session.child = session.round = None
        self.rounds = RoundQueue(self.config, self._listen)

    def _dispatch(self) -> None:
        """Starts what may start now, and has the reader awake in time for its deadlines."""
        self._start_waiting()
        self.reader.wake_by(self.rounds.next_deadline(time.monotonic()))

    def _start_waiting(self) -> None:
        if self.broken is None:
            for round_, reason in self.rounds.start_waiting(self.server):
                self._refuse(round_, reason)

    def _release(self) -> None:
        remove_run_folder(self.run_dir)
        self.group.remove()

    # --- the fork-server ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.server = ZygoteHandle(self.config, self.run_dir, self.off, self.group)

    def _restart(self, reason: str) -> None:
        """Replaces the fork-server. Snippets that ran are lost, those that had not started are queued again."""
        if self.closed:
            return
        _log.warning("sandbox fork-server restarted: %s", reason)
        self.restarts += 1
        self.reader.unwatch(self.server.control)
        self.server.kill()
        for session in self.rounds.live.values():
            if session.child is not None:
                session.child.kill()
        self.server.stop()
        for session in list(self.rounds.live.values()):
            self._requeue(session, reason)
        try:
            self._start()
            self.reader.watch(self.server.control, self._on_control)
        except (SandboxUnavailable, OSError) as error:
            self.broken = error if isinstance(error, SandboxUnavailable) else SandboxUnavailable(str(error))
            _log.error("sandbox cannot be restarted: %s", error)
            for round_ in self.rounds.take_back_all():
                self._refuse(round_, "the sandbox could not be restarted")

    def _requeue(self, session: SessionState, reason: str) -> None:
        """After the fork-server's end: lets go of a session's process; what it had not started yet waits again."""
        round_, started = session.round, session.child is not None and session.child.pidfd is not None
        self._forget(session)
        if round_ is None:
            return
        if started or round_.tries >= _MAX_TRIES or isinstance(round_, Copy):
            self._finish(round_, Status.CRASHED, error=SnippetError("SandboxRestarted", reason, None))
        else:
            round_.deadline = round_.started = None
            self.rounds.waiting.appendleft(round_)

    # --- what arrives, and what does not arrive in time: called by the reader, which holds the lock ------------------

    def _on_control(self) -> None:
        """The fork-server sent something, or ended."""
        try:
            while received := self.server.receive():
                message, descriptors = received
                for ended in message["ended"]:
                    self._on_ended(ended)
                if "forked" in message:
                    self._on_forked(message["forked"], descriptors)
        except EOFError:
            self._restart("it ended")

    def _on_forked(self, id_: str, descriptors: list[int]) -> None:
        session = self.rounds.live.get(id_)
        if session is None or session.child is None:  # cancelled before the process was there
            for pidfd in descriptors:
                kill_process(pidfd)
                os.close(pidfd)
        elif not descriptors:
            self._restart("it could not hand over a process: too many open files")
        else:
            session.child.attach(descriptors[0])
            round_ = session.round
            if isinstance(round_, Copy) and not round_.fork.is_held:  # has nothing to do yet
                round_.deadline = None
            elif round_ is not None:  # its limit counts from here
                round_.deadline = time.monotonic() + self.config.timeout_s

    def _on_ended(self, ended: dict[str, Any]) -> None:
        session = self.rounds.live.get(ended["id"])
        if session is None or session.child is None:
            return
        if self.reader.is_watched(session.child.socket):  # its last words may still be in the socket
            self._on_child(session)
            if self.rounds.live.get(ended["id"]) is None:
                return
        if session.round is None:
            self._discard(session)
        else:
            self._end(session, *how_it_ended(ended, self.config))

    def _on_child(self, session: SessionState) -> None:
        """A child sent something, or hung up."""
        child = self._known_child(session)
        if child is None:
            return
        try:
            frame = child.socket.recv(FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        round_ = session.round
        if not frame:  # hung up; how it ended comes from the fork-server
            self.reader.unwatch(child.socket)
            if round_ is None:
                self._discard(session)
            elif child.pidfd is not None:
                round_.deadline = min(round_.deadline or 0.0, time.monotonic() + _EXIT_S)
        elif round_ is None:  # nobody asked
            self._discard(session)
        elif isinstance(round_, Fork):
            if not self.forks.held(round_, frame, self.server):
                self._end(session, Status.CRASHED, SnippetError("ProtocolError", "it does not hold still", None))
        elif isinstance(round_, Copy):
            self.forks.came(round_, frame)
        else:
            self._on_answer(session, round_, frame)

    def _on_pixels(self, session: SessionState) -> None:
        """A child sent a piece of a picture, or hung up."""
        child = self._known_child(session)
        if child is None:
            return
        try:
            has_come = child.pixels.receive()
        except ValueError as error:
            self._on_nonsense(session, error)
            return
        if has_come and type(session.round) is not Round:
            self._on_nonsense(session, ValueError("pixels that nobody asked for"))
        elif child.pixels.has_ended:
            self.reader.unwatch(child.pixels.socket)

    def _known_child(self, session: SessionState) -> ChildHandle | None:
        """The session's process, once the fork-server has told of it, which it did before it handed the order on: where
        something came of it, that is known or in the control socket. An event may be older, though: of a descriptor
        since closed, whose number it has."""
        child = session.child
        if child is not None and child.pidfd is None:
            self._on_control()
        return child if session.child is child else None

    def _on_nonsense(self, session: SessionState, error: Exception) -> None:
        message = f"the snippet's process sent nonsense: {error}"[:200]
        self._end(session, Status.CRASHED, SnippetError("ProtocolError", message, None))

    def _on_answer(self, session: SessionState, round_: Round, frame: bytes) -> None:
        assert session.child is not None and round_.started is not None
        wall_s = time.monotonic() - round_.started
        try:
            result = read_result(
                frame,
                session.child,
                config=self.config,
                isolation=self.isolation,
                wall_s=wall_s,
                restarted=round_.restarted,
            )
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            self._on_nonsense(session, error)
            return
        self.outbox.put(round_.future, result)
        self.rounds.end_round(session)
        if session.one_shot or result.status is Status.MEMORY:
            self._discard(session)
        else:
            session.child.rest()

    def _on_time(self, now: float) -> float:
        """Ends what is over its time, starts what may start, and returns when it is to be called again."""
        for session in list(self.rounds.live.values()):
            child, round_ = session.child, session.round
            if child is None:  # a copy, gone with another one
                continue
            if round_ is None:
                burns = child.cpu_time() - child.idle_cpu_s > _IDLE_CPU_S
                if burns or now >= child.idle_since + self.config.idle_s:
                    self._discard(session)
            elif round_.deadline is not None and now >= round_.deadline:
                if child.pidfd is None:
                    self._restart("it does not fork")
                    break
                if self.reader.is_watched(child.socket):
                    limit = f"the code ran longer than {self.config.timeout_s:g} s"
                    self._end(session, Status.TIMEOUT, SnippetError("TimeoutError", limit, None))
                else:
                    self._end(session, Status.CRASHED, SnippetError("Crash", "the process hung up", None))
        self._start_waiting()
        return self.rounds.next_deadline(now)

    def _on_own_error(self, error: Exception) -> None:
        """A bug of ours must not hang every caller."""
        _log.error("sandbox client failed", exc_info=error)
        self._restart(f"client error: {error}")

    # --- ends --------------------------------------------------------------------------------------------------------

    def _listen(self, session: SessionState) -> None:
        assert session.child is not None
        self.reader.watch(session.child.socket, partial(self._on_child, session))
        self.reader.watch(session.child.pixels.socket, partial(self._on_pixels, session))

    def _end(self, session: SessionState, status: Status, error: SnippetError) -> None:
        """A snippet that did not come back by itself: its process goes, what it printed stays."""
        child, round_ = session.child, session.round
        if child is not None and round_ is not None:
            cpu_s = child.cpu_time()
            child.kill()
            self._finish(round_, status, stdout=child.printed(), error=error, cpu_s=cpu_s)
        self._discard(session)

    def _discard(self, session: SessionState) -> None:
        """Kills a session's process, if it has one. The round it ran, if any, is the caller's to answer."""
        if session.child is not None:
            session.child.kill()
        self._forget(session)

    def _forget(self, session: SessionState) -> None:
        child = self.rounds.forget(session)
        if child is not None:
            self.reader.unwatch(child.socket)
            self.reader.unwatch(child.pixels.socket)
            child.close()

    def _finish(
        self, round_: Round, status: Status, *, stdout: str = "", error: SnippetError | None = None, cpu_s: float = 0.0
    ) -> None:
        result = SandboxResult(
            status=status,
            stdout=stdout,
            error=error,
            wall_s=time.monotonic() - round_.started if round_.started is not None else 0.0,
            isolation=self.isolation,
            restarted=round_.restarted,
            cpu_s=cpu_s,
        )
        if isinstance(round_, Fork):
            self.forks.end(round_, result)
        elif isinstance(round_, Copy):
            self.forks.fell(round_, "" if error is None else error.message)
        else:
            self.outbox.put(round_.future, result)

    def _refuse(self, round_: Round, reason: str) -> None:
        self._finish(round_, Status.REFUSED, error=SnippetError("Refused", reason, None))


_live: weakref.WeakSet[Client] = weakref.WeakSet()


def _abandon_all() -> None:
    for client in list(_live):
        client.abandon()


os.register_at_fork(after_in_child=_abandon_all)
