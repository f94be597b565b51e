"""The trusted side: queues snippets, hands them to jailed children, and copies text and pixels back.

One reader thread per Sandbox owns all descriptors and deadlines; callers only enqueue and wait on a future, so the
synchronous and the asyncio face are the same thing. A child that misbehaves is killed through its pidfd, which works
even when the fork-server is stuck; a fork-server that dies or stalls is replaced, and what had not started is queued
again. Nothing a child sends is unpickled, decoded as an image, or believed beyond its own snippet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.images import ImageStore, StoredImage
from thyme.sandbox.result import Fix, Layer, SandboxResult, SandboxUnavailable, SnippetError, Status

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("thyme.sandbox")
_BOOT = "import sys; sys.path += sys.argv[2:]; from thyme.sandbox.zygote import main; main(int(sys.argv[1]))"
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
                "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC", "MPLBACKEND": "Agg"}  # fmt: skip
_START_S = 60.0
"""A fork-server that has not reported by then is given up (cold disks are slow)."""
_FORK_S = 5.0
"""A child that is not there by then means a stuck fork-server."""
_EXIT_S = 2.0
"""After a child hung up, its exit status must follow."""
_IDLE_SWEEP_S = 1.0
_IDLE_CPU_S = 0.25
_MAX_TRIES = 2
_FRAME_BYTES = 64 * 1024
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_STATUS = {"ok": Status.OK, "error": Status.ERROR, "memory": Status.MEMORY, "output_limit": Status.OUTPUT_LIMIT}


class _Child:
    """A live process of a session, as the client sees it."""

    def __init__(self, session: SandboxSession, number: int) -> None:
        config = session._client.config
        self.session = session
        self.id = str(number)
        self.pidfd: int | None = None
        self.clock: int | None = None
        self.round: _Round | None = None
        self.idle_since = 0.0
        self.cpu_mark = 0.0
        self.stdout = self.pixels = self.code = -1
        self.socket, self.far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.stdout = _shared_memory("stdout", config.max_stdout_bytes)
            self.pixels = _shared_memory("pixels", config.max_pixels * 3)
            self.code = _shared_memory("code", config.max_code_bytes)
        except OSError:
            self.close()
            raise
        self.socket.setblocking(False)

    def close(self) -> None:
        self.socket.close()
        self.far_end.close()
        for fd in (self.stdout, self.pixels, self.code, self.pidfd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.stdout = self.pixels = self.code = -1
        self.pidfd = None

    def kill(self) -> None:
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class _Round:
    """One snippet on its way."""

    def __init__(self, session: SandboxSession, code: bytes) -> None:
        self.session = session
        self.code = code
        self.future: Future[SandboxResult] = Future()
        self.started: float | None = None
        """When it was handed over, with the order to fork where the session has no process."""
        self.deadline: float | None = None
        self.restarted = False
        self.tries = 0


def _shared_memory(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _import_roots(preload: tuple[str, ...]) -> list[str]:
    """Where the fork-server finds what it imports; nothing else of this process's path."""
    roots = [str(Path(__file__).resolve().parents[2])]
    for name in ("numpy", "PIL", "cv2", "autopep8", "pycodestyle", *preload):
        spec = importlib.util.find_spec(name.split(".")[0])
        origin = spec.origin if spec is not None else None
        if origin is not None:
            path = Path(origin)
            roots.append(str(path.parent.parent if path.name == "__init__.py" else path.parent))
    return list(dict.fromkeys(roots))


class _Client:
    """Owner of the fork-server, the children, the queue and the thread that reads from all of them."""

    def __init__(self, config: SandboxConfig, off: frozenset[str]) -> None:
        self.config, self.off = config, off
        self.lock = threading.RLock()
        self.closed = False
        self.broken: SandboxUnavailable | None = None
        self.queue: deque[_Round] = deque()
        self.children: dict[str, _Child] = {}
        self.by_fd: dict[int, _Child] = {}
        self.running = 0
        self.counter = 0
        self.restarts = 0
        self.done: list[tuple[Future[SandboxResult], SandboxResult]] = []
        self.layers: tuple[Layer, ...] = ()
        self.isolation = "none"
        self.run_dir = Path(tempfile.mkdtemp(prefix="thyme-sandbox-"))
        self.run_dir.chmod(0o711)
        for name in ("images", "root"):
            (self.run_dir / name).mkdir()
            (self.run_dir / name).chmod(0o711)
        (self.run_dir / "canary").write_text("canary")
        self.images = ImageStore(self.run_dir / "images")
        self.storing = threading.Lock()
        self.epoll = select.epoll()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.sleeping_until = 0.0
        self.thread: threading.Thread | None = None
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self._stop_server()
            self._release()
            raise
        self.epoll.register(self.wake, select.EPOLLIN)
        self.thread = threading.Thread(target=self._read_loop, name="thyme-sandbox", daemon=True)
        self.thread.start()
        _live.add(self)

    # --- the fork-server ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Starts a fork-server and reads what it found. SandboxUnavailable if the core is missing."""
        from thyme.sandbox.zygote import setup_message

        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote_pidfd: int | None = None
        errors = os.memfd_create("errors", os.MFD_CLOEXEC)
        environment = dict(_ENVIRONMENT)
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-s", "-S", "-P", "-c", _BOOT, str(theirs.fileno()),
                     *_import_roots(self.config.preload)],
                    env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                    pass_fds=(theirs.fileno(),), start_new_session=True,
                )  # fmt: skip
            self.control.send(setup_message(self.config, self.run_dir, self.off))
            self.control.settimeout(_START_S)
            try:
                message, descriptors, _, _ = socket.recv_fds(self.control, _FRAME_BYTES, 1)
            except OSError as error:
                raise SandboxUnavailable(f"the fork-server did not start: {error}") from error
            if not message or not descriptors:
                os.lseek(errors, 0, os.SEEK_SET)
                last = os.read(errors, 65536).decode("utf-8", "replace").strip().splitlines()[-1:]
                raise SandboxUnavailable(f"the fork-server did not start: {' '.join(last) or 'no reason given'}")
        finally:
            os.close(errors)
        self.zygote_pidfd = descriptors[0]
        self.control.setblocking(False)
        hello = json.loads(message)
        self.layers = tuple(Layer(*layer) for layer in hello["layers"])
        if hello["missing"]:
            raise SandboxUnavailable(f"SandboxConfig.preload names modules that cannot be imported: {hello['missing']}")
        self.isolation = self._judge()
        self.epoll.register(self.control, select.EPOLLIN)

    def _judge(self) -> str:
        """The name of what isolates, or SandboxUnavailable."""
        if self.config.isolation == "none":
            return "none"
        holds = {layer.name for layer in self.layers if layer.ok}
        missing = [layer.name for layer in self.layers if layer.core and not layer.ok]
        if missing and not self.off:
            raise SandboxUnavailable(
                f"this machine cannot isolate model-written code ({', '.join(missing)}). Use a kernel with Landlock "
                "and seccomp, run in a virtual machine that has them, or ask for isolation='none' by name and accept "
                "that snippets can do whatever this user can:",
                self.layers,
            )
        if "landlock" not in holds:
            return "namespaces"
        return "full" if {"private root", "pid namespace", "net namespace"} <= holds else "strong"

    def _stop_server(self) -> None:
        """Ends the fork-server and with it every child."""
        for child in self.children.values():
            child.kill()
        with contextlib.suppress(OSError):  # close alone would not wake the other end
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        if self.process is not None:
            if self.zygote_pidfd is not None:
                if not _gone(self.zygote_pidfd, 1.0):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self.zygote_pidfd, signal.SIGKILL)
                os.close(self.zygote_pidfd)
                self.zygote_pidfd = None
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def _restart(self, reason: str) -> None:
        """Replaces the fork-server. Snippets that ran are lost, those that had not started are queued again."""
        if self.closed:
            return
        _log.warning("sandbox fork-server restarted: %s", reason)
        self.restarts += 1
        if self.zygote_pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.zygote_pidfd, signal.SIGKILL)
        self._stop_server()
        for child in list(self.children.values()):
            round_ = child.round
            started = child.pidfd is not None
            self._forget(child)
            if round_ is None:
                continue
            if started or round_.tries >= _MAX_TRIES:
                self._finish(round_, Status.CRASHED, error=SnippetError("SandboxRestarted", reason, None))
            else:
                round_.deadline = round_.started = None
                self.queue.appendleft(round_)
        try:
            self._start()
        except (SandboxUnavailable, OSError) as error:
            self.broken = error if isinstance(error, SandboxUnavailable) else SandboxUnavailable(str(error))
            self._stop_server()
            _log.error("sandbox cannot be restarted: %s", error)
            while self.queue:
                self._refuse(self.queue.popleft(), "the sandbox could not be restarted")

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, session: SandboxSession, code: str) -> _Round:
        content = code.encode("utf-8", "replace")
        round_ = _Round(session, content)
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
                self._dispatch()
        self._flush()
        return round_

    def cancel(self, round_: _Round) -> None:
        """Takes a snippet back; one that runs is killed."""
        with self.lock:
            if round_ in self.queue:
                self.queue.remove(round_)
            child = round_.session._child
            if child is not None and child.round is round_:
                child.round = None
                self.running -= 1
                self._discard(child)
            self._dispatch()
        self._flush()

    def acquire(self, image: Image.Image | str | os.PathLike[str]) -> StoredImage:
        """The stored form of a session's image. ValueError where it cannot be read."""
        # One at a time: a thread that stores an image another thread is storing replaces the file, and the Landlock
        # rule of a child forked in between is for the file that was there before: it may not read its own image.
        with self.storing:
            return self.images.acquire(image)

    def close_session(self, session: SandboxSession) -> None:
        with self.lock:
            session._closed = True
            for round_ in [r for r in self.queue if r.session is session]:
                self.queue.remove(round_)
                self._refuse(round_, "the session was closed")
            child, image = session._child, None
            if child is not None:
                running, child.round = child.round, None
                if running is not None:
                    self.running -= 1
                    self._refuse(running, "the session was closed while its code ran")
                self._discard(child)
            if not self.closed:
                image, session._image = session._image, None
                self._dispatch()
        if image is not None:
            with self.storing:
                self.images.release(image)
        self._flush()

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            while self.queue:
                self._refuse(self.queue.popleft(), "the sandbox was closed")
            for child in list(self.children.values()):
                if child.round is not None:
                    self._refuse(child.round, "the sandbox was closed")
                    child.round = None
                child.kill()
                self._forget(child)
        self._wake_up()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(5.0)
        self._stop_server()
        self._release()
        self._flush()
        _live.discard(self)

    def _release(self) -> None:
        self.epoll.close()
        os.close(self.wake)
        from thyme.sandbox.scratch import wipe

        with contextlib.suppress(OSError):
            for slot in (self.run_dir / "slots").iterdir():
                for _ in wipe(slot):
                    pass
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def abandon(self) -> None:
        """In a fork of this process: let go of the descriptors, so that the server notices when the original ends."""
        self.closed = True
        self.lock, self.storing = threading.RLock(), threading.Lock()  # a thread that is not here may have held them
        self.control.close()
        for child in self.children.values():
            child.session._child = None
            child.close()
        self.children, self.by_fd, self.queue = {}, {}, deque()

    # --- the queue ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Starts whatever may start now, first come first served."""
        skipped: list[_Round] = []
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
        self._wake_if_sooner()

    def _num_sessions(self) -> int:
        return sum(not child.session._one_shot for child in self.children.values())

    def _begin(self, round_: _Round) -> bool:
        session, now, limit = round_.session, time.monotonic(), self.config.timeout_s
        child = session._child
        if child is None:
            self.counter += 1
            child = _Child(session, self.counter)
            image = session._image
            order = {
                "fork": child.id, "image_path": session.image_path, "image_file": image.file if image else None,
                "image_format": image.format if image else None, "seed": session.seed,
            }  # fmt: skip
            try:
                with child.far_end:
                    socket.send_fds(
                        self.control, [json.dumps(order).encode()],
                        [child.stdout, child.far_end.fileno(), child.pixels, child.code], socket.MSG_DONTWAIT,
                    )  # fmt: skip
            except BlockingIOError:
                child.close()
                return False
            except OSError:  # the server is gone: its end of file is on the way and restarts it
                child.close()
                return False
            session._child = child
            self.children[child.id] = child
            self.by_fd[child.socket.fileno()] = child
            self.epoll.register(child.socket, select.EPOLLIN)
            round_.restarted = session._had_child
            session._had_child = True
            round_.tries += 1
            limit = _FORK_S
        round_.started, round_.deadline = now, now + limit
        os.pwrite(child.stdout, bytes(self.config.max_stdout_bytes), 0)
        os.pwrite(child.code, round_.code, 0)
        with contextlib.suppress(OSError):  # where it died while idle the event follows
            child.socket.send(str(len(round_.code)).encode())
        child.round = round_
        self.running += 1
        return True

    # --- the reader thread -------------------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        while True:
            with self.lock:
                if self.closed:
                    return
                now = time.monotonic()
                self.sleeping_until = self._next_deadline(now)
                wait = min(3600.0, max(0.0, self.sleeping_until - now))
            events = self.epoll.poll(wait)
            with self.lock:
                if self.closed:
                    return
                try:
                    for fd, _ in events:
                        self._on_event(fd)
                    self._on_time(time.monotonic())
                    self._dispatch()
                except Exception as error:  # our own bug must not hang every caller
                    _log.exception("sandbox client failed")
                    self._restart(f"client error: {error}")
            self._flush()

    def _next_deadline(self, now: float) -> float:
        first = now + 3600.0
        for child in self.children.values():
            if child.round is not None:
                first = min(first, child.round.deadline or first)
            else:
                first = min(first, child.idle_since + self.config.idle_s, now + _IDLE_SWEEP_S)
        if self.queue and self.running < self.config.workers:
            first = min(first, now + 0.01)
        return first

    def _wake_if_sooner(self) -> None:
        if (
            self.thread is not threading.current_thread()
            and self._next_deadline(time.monotonic()) < self.sleeping_until
        ):
            self._wake_up()

    def _wake_up(self) -> None:
        os.eventfd_write(self.wake, 1)

    def _on_event(self, fd: int) -> None:
        if fd == self.wake:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.wake)
        elif fd == self.control.fileno():
            self._on_control()
        elif fd in self.by_fd:
            self._on_child(self.by_fd[fd])

    def _on_control(self) -> None:
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self.control, _FRAME_BYTES, 1)
            except BlockingIOError:
                return
            except OSError as error:
                message, descriptors = b"", []
                _log.debug("control socket: %s", error)
            if not message:
                self._restart("it ended")
                return
            order = json.loads(message)
            if "forked" in order:
                self._on_forked(order["forked"], descriptors)
            else:
                self._on_exited(order)

    def _on_forked(self, id_: str, descriptors: list[int]) -> None:
        child = self.children.get(id_)
        if child is None:  # cancelled before it was born
            for fd in descriptors:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)
        elif not descriptors:
            self._restart("it could not hand over a process: too many open files")
        else:
            child.pidfd = descriptors[0]
            child.clock = _cpu_clock(child.pidfd)
            if child.round is not None:  # its limit counts from its birth
                child.round.deadline = time.monotonic() + self.config.timeout_s

    def _on_child(self, child: _Child) -> None:
        try:
            frame = child.socket.recv(_FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if not frame:  # hung up; how it ended comes from the fork-server
            self.epoll.unregister(child.socket)
            del self.by_fd[child.socket.fileno()]
            if child.round is None:
                self._discard(child)
            elif child.pidfd is not None:
                child.round.deadline = min(child.round.deadline or 0.0, time.monotonic() + _EXIT_S)
            return
        round_ = child.round
        if round_ is None:  # nobody asked
            self._discard(child)
            return
        try:
            result = self._read_frame(child, round_, frame, time.monotonic())
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            self._end(
                child,
                Status.CRASHED,
                SnippetError("ProtocolError", f"the snippet's process sent nonsense: {error}"[:200], None),
            )
            return
        child.round = None
        self.running -= 1
        child.idle_since = time.monotonic()
        child.cpu_mark = _cpu_time(child)
        if child.session._one_shot or result.status is Status.MEMORY:
            self._discard(child)
        self.done.append((round_.future, result))

    def _read_frame(self, child: _Child, round_: _Round, frame: bytes, arrived: float) -> SandboxResult:
        """A result from what the child sent, every field checked. Pixels are copied by read, never mapped."""
        assert round_.started is not None
        from PIL import Image

        config, data = self.config, json.loads(frame)
        status = _STATUS[data["status"]]
        length = _integer(data["stdout"], 0, config.max_stdout_bytes)
        error = None
        if data["error"] is not None:
            kind, message, line = data["error"]
            error = SnippetError(
                _text(kind, 200),
                _text(message, config.max_error_bytes),
                None if line is None else _integer(line, 0, 1 << 31),
            )
        fixes = tuple(Fix(_text(k, 50), _integer(n, 0, 1 << 31), _text(m, 400)) for k, n, m in data["fixes"][:64])
        images, offset = [], 0
        if len(data["images"]) > config.max_images:
            raise ValueError("too many images")
        for pair in data["images"]:
            width, height = (_integer(side, 1, config.max_pixels) for side in pair)
            size = width * height * 3
            if offset + size > config.max_pixels * 3 or max(width, height) > config.max_aspect * min(width, height):
                raise ValueError("image over the limits")
            images.append(Image.frombytes("RGB", (width, height), _read_all(child.pixels, size, offset)))
            offset += size
        return SandboxResult(
            status=status, stdout=_read_all(child.stdout, length, 0).decode("utf-8", "replace"), error=error,
            images=tuple(images), fixes=fixes, wall_s=arrived - round_.started,
            isolation=self.isolation, restarted=round_.restarted, cpu_s=_number(data["cpu_s"]),
            peak_mib=_number(data["peak_mib"]),
        )  # fmt: skip

    def _on_exited(self, order: dict[str, Any]) -> None:
        child = self.children.get(order["exited"])
        if child is None:
            return
        if child.socket.fileno() in self.by_fd:  # its last words may still be in the socket
            self._on_child(child)
            if self.children.get(child.id) is not child or child.round is None:
                self._discard(child)
                return
        if child.round is None:
            self._discard(child)
            return
        if "failed" in order:
            self._end(
                child, Status.REFUSED, SnippetError("OSError", f"no process could be started: {order['failed']}", None)
            )
            return
        status, config = order["status"], self.config
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if order["scratch"]:
            limit = f"more than {config.scratch_mib} MiB or {config.max_files} files in the working folder"
            self._end(child, Status.OUTPUT_LIMIT, SnippetError("OutputLimit", limit, None))
        elif number == signal.SIGXCPU or (number == signal.SIGKILL and order["cpu_s"] >= config.timeout_s):
            self._end(child, Status.TIMEOUT, SnippetError("TimeoutError", "the session used up its CPU time", None))
        elif number == signal.SIGKILL:
            self._end(
                child, Status.MEMORY, SnippetError("MemoryError", "killed by the system for want of memory", None)
            )
        elif number:
            self._end(
                child,
                Status.CRASHED,
                SnippetError("Crash", f"the interpreter died of {signal.Signals(number).name}", None),
            )
        else:
            code = os.WEXITSTATUS(status)
            self._end(child, Status.CRASHED, SnippetError("Crash", f"the process left early with code {code}", None))

    def _on_time(self, now: float) -> None:
        for child in list(self.children.values()):
            round_ = child.round
            if round_ is None:
                burns = _cpu_time(child) - child.cpu_mark > _IDLE_CPU_S
                if burns or now >= child.idle_since + self.config.idle_s:
                    self._discard(child)
            elif round_.deadline is not None and now >= round_.deadline:
                if child.pidfd is None:
                    self._restart("it does not fork")
                    return
                if child.socket.fileno() not in self.by_fd:
                    self._end(child, Status.CRASHED, SnippetError("Crash", "the process hung up", None))
                    continue
                limit = f"the code ran longer than {self.config.timeout_s:g} s"
                self._end(child, Status.TIMEOUT, SnippetError("TimeoutError", limit, None))

    # --- ends --------------------------------------------------------------------------------------------------------

    def _end(self, child: _Child, status: Status, error: SnippetError) -> None:
        """A snippet that did not come back by itself: its process goes, what it printed stays."""
        round_ = child.round
        child.round = None
        if round_ is not None:
            self.running -= 1
            child.kill()
            printed = _read_all(child.stdout, self.config.max_stdout_bytes, 0).rstrip(b"\0").decode("utf-8", "replace")
            self._finish(round_, status, stdout=printed, error=error)
        self._discard(child)

    def _discard(self, child: _Child) -> None:
        child.kill()
        self._forget(child)

    def _forget(self, child: _Child) -> None:
        if self.children.pop(child.id, None) is None:
            return
        if self.by_fd.pop(child.socket.fileno(), None) is not None:
            self.epoll.unregister(child.socket)
        if child.round is not None:
            self.running -= 1
        if child.session._child is child:
            child.session._child = None
        child.close()

    def _finish(self, round_: _Round, status: Status, *, stdout: str = "", error: SnippetError | None = None) -> None:
        wall = time.monotonic() - round_.started if round_.started is not None else 0.0
        result = SandboxResult(status=status, stdout=stdout, error=error, wall_s=wall, isolation=self.isolation,
                               restarted=round_.restarted)  # fmt: skip
        self.done.append((round_.future, result))

    def _refuse(self, round_: _Round, reason: str) -> None:
        self._finish(round_, Status.REFUSED, error=SnippetError("Refused", reason, None))

    def _flush(self) -> None:
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


def _gone(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _cpu_clock(pidfd: int) -> int | None:
    """Id of the CPU clock of the process behind a pidfd."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            return (~pid << 3) | 2 if pid > 0 else None
    return None


def _cpu_time(child: _Child) -> float:
    if child.clock is None:
        return 0.0
    try:
        return time.clock_gettime(child.clock)
    except OSError:
        return 0.0


def _read_all(fd: int, size: int, offset: int) -> bytes:
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            raise ValueError("short read")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"number out of range: {value!r}"[:80])
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError("number out of range")
    return float(value)


def _text(value: Any, limit: int) -> str:
    if type(value) is not str:
        raise ValueError("text expected")
    return value.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


class SandboxSession:
    """The snippets of one rollout: one process, whose variables live from round to round. Made by Sandbox.session."""

    def __init__(self, owner: Sandbox, image: StoredImage | None, image_path: str, seed: int, one_shot: bool) -> None:
        self._owner = owner  # a sandbox that nobody holds is closed
        self._client = owner._client
        self._image = image
        self._one_shot = one_shot
        self._child: _Child | None = None
        self._had_child = False
        self._closed = False
        self.image_path = image_path
        self.seed = seed

    def run(self, code: str) -> SandboxResult:
        """Runs one snippet and waits for it. Never raises because of the snippet; see SandboxResult.status."""
        round_ = self._client.submit(self, code)
        try:
            return round_.future.result()
        except BaseException:
            round_.future.cancel()
            raise

    async def arun(self, code: str) -> SandboxResult:
        """`run` for asyncio. A cancelled await kills the snippet."""
        return await asyncio.wrap_future(self._client.submit(self, code).future)

    def close(self) -> None:
        """Ends the process and deletes its scratch. Further runs are REFUSED."""
        self._client.close_session(self)

    def __enter__(self) -> SandboxSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Sandbox:
    """Runs model-written Python in jailed processes. Use as a context manager, or call close().

    Raises:
        SandboxUnavailable: the machine lacks the layers that isolation needs (config.isolation="auto").
    """

    def __init__(self, config: SandboxConfig | None = None, *, _off: frozenset[str] = frozenset()) -> None:
        # _off switches single layers off, so that tests can show that each of them is needed.
        self.config = config if config is not None else SandboxConfig()
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the sandbox needs Linux, this is {sys.platform}")
        if self.config.isolation == "none":
            warnings.warn("sandbox isolation is 'none': model-written code can do whatever this user can",
                          RuntimeWarning, stacklevel=2)  # fmt: skip
        self._client = _Client(self.config, _off)
        self._finalizer = weakref.finalize(self, self._client.close)

    def session(
        self, image: Image.Image | str | os.PathLike[str] | None = None, image_path: str | None = None, *, seed: int = 0
    ) -> SandboxSession:
        """A session for one rollout. Its process is forked at its first snippet.

        Args:
            image: the input image, a path to it, or None. A PIL image must not be changed while sessions use it.
            image_path: the path the model was told; defaults to the path given, else "image.png".
            seed: of `random` and `numpy.random` in the session.

        Raises:
            ValueError: the image cannot be read.
        """
        return self._session(image, image_path, seed, one_shot=False)

    def run(
        self, code: str, image: Image.Image | str | os.PathLike[str] | None = None, image_path: str | None = None, *,
        seed: int = 0,
    ) -> SandboxResult:  # fmt: skip
        """One snippet in a process of its own."""
        with self._session(image, image_path, seed, one_shot=True) as session:
            return session.run(code)

    async def arun(
        self, code: str, image: Image.Image | str | os.PathLike[str] | None = None, image_path: str | None = None, *,
        seed: int = 0,
    ) -> SandboxResult:  # fmt: skip
        """`run` for asyncio."""
        with self._session(image, image_path, seed, one_shot=True) as session:
            return await session.arun(code)

    def layers(self) -> tuple[Layer, ...]:
        """What isolates here, layer by layer, and what the probe child was refused."""
        return self._client.layers

    @property
    def isolation(self) -> str:
        """ "full", "strong", "namespaces" or "none"."""
        return self._client.isolation

    def close(self) -> None:
        """Kills what runs, ends the fork-server, deletes every scratch folder."""
        self._finalizer()

    def _session(self, image: Any, image_path: str | None, seed: int, *, one_shot: bool) -> SandboxSession:
        if image_path is None:
            image_path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image.png"
        stored = None if image is None else self._client.acquire(image)
        return SandboxSession(self, stored, image_path, seed, one_shot)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_live: weakref.WeakSet[_Client] = weakref.WeakSet()


def _abandon_all() -> None:
    for client in list(_live):
        client.abandon()


os.register_at_fork(after_in_child=_abandon_all)
