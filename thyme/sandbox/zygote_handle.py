"""The fork-server (zygote.py) as the trusted side holds it: started by exec, spoken to over one socket."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thyme.sandbox.cgroup import Group, spare
from thyme.sandbox.child_handle import kill_process, pid_of
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.protocol import GOODBYE, MESSAGE_BYTES, Held, Order, Setup
from thyme.sandbox.result import Layer, SandboxUnavailable

_log = logging.getLogger("thyme.sandbox")
_BOOT = (
    "import sys; sys.path += sys.argv[2:]; from thyme.sandbox import template_memory; template_memory.gather_arenas(); "
    "from thyme.sandbox.zygote import main; main(int(sys.argv[1]))"
)
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "MPLBACKEND": "Agg",
    "EAGER_IMPORT": "1",  # of scikit-image: what is not loaded before a snippet runs cannot be loaded any more
    # Of pyarrow, which pandas imports where it is installed: the fork-server must have one thread.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # Pictures of megabytes in huge pages: first touches are a third of what decoding and encoding costs.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_START_S = 60.0
"""A fork-server that has not reported by then is given up (cold disks are slow)."""


class ZygoteHandle:
    """A running fork-server and what it found the machine to offer.

    Args:
        config: the sandbox's limits.
        run_dir: the client's folder; see run_folder.py.
        off: layers that are switched off, so that tests can show that each of them is needed.
        group: the control groups that bound the fork-server with all its children.

    Raises:
        SandboxUnavailable: it does not start, or the layers that isolation needs are missing.
    """

    def __init__(self, config: SandboxConfig, run_dir: Path, off: frozenset[str], group: Group) -> None:
        self.layers: tuple[Layer, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd: int | None = None
        """Of the process that forks, which need not be the one we started."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            hello = self._start(theirs, config, run_dir, off, group)
            group.bound()
            self.layers = (*(Layer(*layer) for layer in hello["layers"]), group.layer())
            if hello["missing"]:
                raise SandboxUnavailable(
                    f"SandboxConfig.preload names modules that cannot be imported: {hello['missing']}"
                )
            self.isolation = _judge(self.layers, config, off)
        except BaseException:
            self.stop()
            raise

    def _start(
        self, theirs: socket.socket, config: SandboxConfig, run_dir: Path, off: frozenset[str], group: Group
    ) -> dict[str, Any]:
        environment = {**_ENVIRONMENT, "MPLCONFIGDIR": str(run_dir)}  # where matplotlib keeps its list of fonts
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs, os.fdopen(os.memfd_create("errors", os.MFD_CLOEXEC), "w+b") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-c", _BOOT, str(theirs.fileno()), *_import_roots(config.preload)],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            theirs.close()  # so that its end is seen
            group.add(self.process.pid)  # it forks nothing before it is told how
            self.control.send(Setup(config=config, run_dir=run_dir, off=off, groups=tuple(group.folders)).encode())
            self.control.settimeout(_START_S)
            reason = "no reason given"
            try:
                message, descriptors, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 2)
            except OSError as error:  # too slow, or it ended without having read all that it was told
                message, descriptors, reason = b"", [], str(error)
            if not message or len(descriptors) < 2:
                errors.seek(0)
                last = errors.read(65536).decode("utf-8", "replace").strip().splitlines()[-1:]
                raise SandboxUnavailable(f"the fork-server did not start: {' '.join(last) or reason}")
        self.pidfd = descriptors[0]
        for pidfd in descriptors:  # the process that serves, and the one that forks for it
            spare(pid_of(pidfd))
        os.close(descriptors[1])
        self.control.setblocking(False)
        hello: dict[str, Any] = json.loads(message)
        return hello

    def fork(self, order: Order, descriptors: Sequence[int]) -> None:
        """Asks for a child, which gets `descriptors`. Never blocks.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the server has ended.
        """
        socket.send_fds(self.control, [json.dumps(order).encode()], descriptors, socket.MSG_DONTWAIT)

    def held(self, id_: str) -> None:
        """Tells that a process holds still: children that were ordered as its copies become that. Never blocks.

        Raises:
            BlockingIOError: the socket is full.
            OSError: the server has ended.
        """
        self.control.send(json.dumps(Held(held=id_)).encode(), socket.MSG_DONTWAIT)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message with its descriptors; None where there is none yet.

        Raises:
            EOFError: the server has ended.
        """
        try:
            message, descriptors, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return None
        except OSError as error:
            _log.debug("control socket: %s", error)
            raise EOFError from error
        if not message:
            raise EOFError
        return json.loads(message.decode()), descriptors

    def kill(self) -> None:
        """Ends it at once, also where it is stopped or stuck."""
        if self.pidfd is not None:
            kill_process(self.pidfd)

    def stop(self) -> None:
        """Ends it, and with it every child. Twice is fine."""
        with contextlib.suppress(OSError):
            self.control.send(GOODBYE)
        with contextlib.suppress(OSError):  # close alone would not wake the other end
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        if self.pidfd is not None:
            if not _gone(self.pidfd, 1.0):
                self.kill()
            os.close(self.pidfd)
            self.pidfd = None
        if self.process is not None:
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


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


def _judge(layers: tuple[Layer, ...], config: SandboxConfig, off: frozenset[str]) -> str:
    """The name of what isolates.

    Raises:
        SandboxUnavailable: a layer is missing without which nothing does.
    """
    if config.isolation == "none":
        return "none"
    holds = {layer.name for layer in layers if layer.ok}
    missing = [layer.name for layer in layers if layer.core and not layer.ok]
    if missing and not off:
        raise SandboxUnavailable(
            f"this machine cannot isolate model-written code ({', '.join(missing)}). Use a kernel with Landlock "
            "and seccomp, run in a virtual machine that has them, or ask for isolation='none' by name and accept "
            "that snippets can do whatever this user can:",
            layers,
        )
    if "landlock" not in holds:
        return "namespaces"
    return "full" if {"private root", "pid namespace", "net namespace"} <= holds else "strong"


def _gone(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
