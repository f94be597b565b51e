"""The trusted side: queues snippets, hands them to jailed children, and resolves what callers wait for.

Callers only enqueue and wait on a future, so the synchronous and the asyncio face are the same thing; one thread
(reader.py) reads from all children and keeps all deadlines. A child that misbehaves is killed through its pidfd, which
works even when the fork-server is stuck; a fork-server that dies or stalls is replaced, and what had not started is
queued again. Nothing a child sends is unpickled, decoded as an image, or believed beyond its own snippet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from thyme.sandbox.cgroup import Group
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.images import ImageStore
from thyme.sandbox.process import ChildProcess, Round
from thyme.sandbox.reader import Reader
from thyme.sandbox.result import Layer, SandboxResult, SandboxUnavailable, SnippetError, Status
from thyme.sandbox.scratch import wipe
from thyme.sandbox.server import ForkServer

if TYPE_CHECKING:
    from thyme.sandbox.pool import SandboxSession

_log = logging.getLogger("thyme.sandbox")
_FORK_S = 5.0
"""A child that is not there by then means a stuck fork-server."""
_MAX_TRIES = 2


class Client:
    """Owner of the fork-server, the queue and the children. Every method may be called from any thread."""

    def __init__(self, config: SandboxConfig, off: frozenset[str]) -> None:
        self.config, self.off = config, off
        self.lock = threading.RLock()
        self.closed = False
        self.broken: SandboxUnavailable | None = None
        self.queue: deque[Round] = deque()
        self.children: dict[str, ChildProcess] = {}
        self.running = 0
        self.counter = 0
        self.restarts = 0
        self.done: list[tuple[Future[SandboxResult], SandboxResult]] = []
        self.run_dir = Path(tempfile.mkdtemp(prefix="thyme-sandbox-"))
        self.run_dir.chmod(0o711)
        self.group = Group(config, off)
        try:
            for name in ("images", "root"):
                (self.run_dir / name).mkdir()
                (self.run_dir / name).chmod(0o711)
            (self.run_dir / "canary").write_text("canary")
            self.images = ImageStore(self.run_dir / "images")
            self._start()
            self.reader = Reader(self)
        except BaseException:
            if hasattr(self, "server"):
                self.server.stop()
            self._release()
            raise
        self.reader.start()
        _live.add(self)

    # --- the fork-server ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.server = ForkServer(self.config, self.run_dir, self.off, self.group)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.server.layers

    @property
    def isolation(self) -> str:
        return self.server.isolation

    def restart(self, reason: str) -> None:
        """Replaces the fork-server. Snippets that ran are lost, those that had not started are queued again."""
        if self.closed:
            return
        _log.warning("sandbox fork-server restarted: %s", reason)
        self.restarts += 1
        self.reader.unwatch(self.server.control)
        self.server.kill()
        for child in self.children.values():
            child.kill()
        self.server.stop()
        for child in list(self.children.values()):
            round_ = child.round
            started = child.pidfd is not None
            self.forget(child)
            if round_ is None:
                continue
            if started or round_.tries >= _MAX_TRIES:
                self._finish(round_, Status.CRASHED, error=SnippetError("SandboxRestarted", reason, None))
            else:
                round_.deadline = round_.started = None
                self.queue.appendleft(round_)
        try:
            self._start()
            self.reader.watch(self.server.control)
        except (SandboxUnavailable, OSError) as error:
            self.broken = error if isinstance(error, SandboxUnavailable) else SandboxUnavailable(str(error))
            _log.error("sandbox cannot be restarted: %s", error)
            while self.queue:
                self._refuse(self.queue.popleft(), "the sandbox could not be restarted")

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, session: SandboxSession, code: str) -> Round:
        """Queues one snippet; its future always comes to a result."""
        content = code.encode("utf-8", "replace")
        round_ = Round(session, content)
        round_.future.add_done_callback(lambda f: self.cancel(round_) if f.cancelled() else None)
        with self.lock:
            if self.closed or session._closed:
                self._refuse(round_, "the session is closed" if session._closed else "the sandbox is closed")
            elif self.broken is not None:
                self._refuse(round_, str(self.broken))
            elif len(content) > self.config.max_code_bytes:
                self._refuse(round_, f"the code has {len(content)} bytes, more than {self.config.max_code_bytes}")
            else:
                self.queue.append(round_)
                self.dispatch()
        self.flush()
        return round_

    def cancel(self, round_: Round) -> None:
        """Takes a snippet back; one that runs is killed."""
        with self.lock:
            if round_ in self.queue:
                self.queue.remove(round_)
            child = round_.session._child
            if child is not None and child.round is round_:
                self.discard(child)
            if not self.closed:
                self.dispatch()
        self.flush()

    def close_session(self, session: SandboxSession) -> None:
        """Ends the session's process; what it has queued or running is REFUSED."""
        with self.lock:
            session._closed = True
            for round_ in [r for r in self.queue if r.session is session]:
                self.queue.remove(round_)
                self._refuse(round_, "the session was closed")
            child, image = session._child, None
            if child is not None:
                if child.round is not None:
                    self._refuse(child.round, "the session was closed while its code ran")
                self.discard(child)
            if not self.closed:
                image, session._image = session._image, None
                self.dispatch()
        if image is not None:
            self.images.release(image)
        self.flush()

    def close(self) -> None:
        """Kills what runs, ends the fork-server, deletes every scratch folder. Twice is fine."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            while self.queue:
                self._refuse(self.queue.popleft(), "the sandbox was closed")
            for child in list(self.children.values()):
                if child.round is not None:
                    self._refuse(child.round, "the sandbox was closed")
                self.discard(child)
        self.reader.stop()
        self.server.stop()
        self._release()
        self.flush()
        _live.discard(self)

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            for slot in (self.run_dir / "slots").iterdir():
                for _ in wipe(str(slot)):
                    pass
        shutil.rmtree(self.run_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # still there where no descriptor was left to look into it
            (self.run_dir / "canary").unlink(missing_ok=True)
            for folder in (self.run_dir / "images", self.run_dir / "root", self.run_dir):
                folder.rmdir()
        self.group.remove()

    def abandon(self) -> None:
        """In a fork of this process: let go of the descriptors, so that the server notices when the original ends."""
        self.closed = True
        self.lock = threading.RLock()  # a thread that is not here may have held it
        self.images.abandon()
        self.server.control.close()
        for child in self.children.values():
            child.session._child = None
            child.close()
        self.children, self.queue = {}, deque()

    # --- the queue ---------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Starts whatever may start now, first come first served."""
        skipped: list[Round] = []
        busy: set[int] = set()
        while self.queue and self.running < self.config.workers and self.broken is None:
            round_ = self.queue.popleft()
            session = round_.session
            child = session._child
            waits_for_itself = id(session) in busy or (child is not None and child.round is not None)
            no_room = child is None and not session._one_shot and self._num_sessions() >= self.config.max_sessions
            if waits_for_itself or no_room:
                busy.add(id(session))
                skipped.append(round_)
                continue
            try:
                started = self._begin(round_)
            except OSError as error:
                self._refuse(round_, f"the sandbox is out of resources: {error}")
                continue
            if not started:  # the control socket is full: the reader tries again
                self.queue.appendleft(round_)
                break
        self.queue.extendleft(reversed(skipped))
        self.reader.wake_if_sooner()

    def _num_sessions(self) -> int:
        return sum(not child.session._one_shot for child in self.children.values())

    def _begin(self, round_: Round) -> bool:
        session, now, limit = round_.session, time.monotonic(), self.config.timeout_s
        child = session._child
        if child is None:
            self.counter += 1
            child = ChildProcess(session, self.counter, self.config)
            if not self._order(child):
                child.close()
                return False
            session._child = child
            self.children[child.id] = child
            self.reader.watch(child.socket, child)
            round_.restarted = session._had_child
            session._had_child = True
            round_.tries += 1
            limit = _FORK_S
        round_.started, round_.deadline = now, now + limit
        child.hand_over(round_)
        self.running += 1
        return True

    def _order(self, child: ChildProcess) -> bool:
        """Sends the order to fork; False where it cannot be sent now."""
        session = child.session
        image = session._image
        order = {
            "fork": child.id, "image_path": session.image_path, "image_file": Path(image.file).name if image else None,
            "image_format": image.format if image else None, "seed": session.seed,
        }  # fmt: skip
        with child.far_end:
            try:
                self.server.fork(order, [child.stdout, child.far_end.fileno(), child.pixels, child.code])
            except OSError:  # full, or the server is gone: its end of file is on the way and restarts it
                return False
        return True

    # --- ends --------------------------------------------------------------------------------------------------------

    def end(self, child: ChildProcess, status: Status, error: SnippetError) -> None:
        """A snippet that did not come back by itself: its process goes, what it printed stays."""
        if child.round is not None:
            cpu_s = child.cpu_time()
            child.kill()
            self._finish(child.round, status, stdout=child.printed(), error=error, cpu_s=cpu_s)
        self.discard(child)

    def came_back(self, child: ChildProcess, result: SandboxResult) -> None:
        """A snippet came back; its process waits for the next one, where there may be one."""
        assert child.round is not None
        self.done.append((child.round.future, result))
        self._no_longer_runs(child)
        child.idle_since = time.monotonic()
        child.cpu_mark = child.cpu_time()
        if child.session._one_shot or result.status is Status.MEMORY:
            self.discard(child)

    def discard(self, child: ChildProcess) -> None:
        """Kills a process. The round it ran, if any, is the caller's to answer."""
        child.kill()
        self.forget(child)

    def forget(self, child: ChildProcess) -> None:
        if self.children.pop(child.id, None) is None:
            return
        self.reader.unwatch(child.socket)
        self._no_longer_runs(child)
        if child.session._child is child:
            child.session._child = None
        child.close()

    def _no_longer_runs(self, child: ChildProcess) -> None:
        if child.round is not None:
            child.round = None
            self.running -= 1

    def _finish(
        self, round_: Round, status: Status, *, stdout: str = "", error: SnippetError | None = None, cpu_s: float = 0.0
    ) -> None:
        wall = time.monotonic() - round_.started if round_.started is not None else 0.0
        result = SandboxResult(status=status, stdout=stdout, error=error, wall_s=wall, isolation=self.isolation,
                               restarted=round_.restarted, cpu_s=cpu_s)  # fmt: skip
        self.done.append((round_.future, result))

    def _refuse(self, round_: Round, reason: str) -> None:
        self._finish(round_, Status.REFUSED, error=SnippetError("Refused", reason, None))

    def flush(self) -> None:
        """Resolves futures outside the lock: their callbacks are other people's code."""
        while True:
            with self.lock:
                ready, self.done = self.done, []
            if not ready:
                return
            for future, result in ready:
                if not future.cancelled():
                    with contextlib.suppress(Exception):  # cancelled in this very moment
                        future.set_result(result)


_live: weakref.WeakSet[Client] = weakref.WeakSet()


def _abandon_all() -> None:
    for client in list(_live):
        client.abandon()


os.register_at_fork(after_in_child=_abandon_all)
