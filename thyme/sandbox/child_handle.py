"""The process of a session as the trusted side holds it: sockets, shared memory, a pidfd, its CPU clock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time

from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.pixel_stream import PixelStream

FRAME_BYTES = 64 * 1024
"""The longest answer that is read."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ChildHandle:
    """Two sockets to the process of one session and two pieces of memory shared with it, sealed against resizing.

    The handle is made before the fork-server is asked for the process; `pidfd` is None until the process is there.
    """

    def __init__(self, number: int, config: SandboxConfig) -> None:
        self.id = str(number)
        self.max_stdout_bytes = config.max_stdout_bytes
        self.pidfd: int | None = None
        self.idle_since = 0.0
        """When it answered last, by the monotonic clock."""
        self.idle_cpu_s = 0.0
        """CPU seconds it had used by then."""
        self._clock: int | None = None
        self._used = False  # whether something may have been printed: fresh memory is zero
        self.stdout = self.code = -1
        self.pixels = PixelStream(config)
        try:
            self.socket, self.far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self.pixels.close()
            raise
        try:
            self.stdout = _shared_memory("stdout", config.max_stdout_bytes)
            self.code = _shared_memory("code", config.max_code_bytes)
        except OSError:
            self.close()
            raise
        self.socket.setblocking(False)

    def close(self) -> None:
        """Closes every descriptor. Does not end the process."""
        self.socket.close()
        self.far_end.close()
        self.pixels.close()
        for fd in (self.stdout, self.code, self.pidfd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.stdout = self.code = -1
        self.pidfd = None

    def kill(self) -> None:
        """Sends SIGKILL, where the process is there."""
        if self.pidfd is not None:
            kill_process(self.pidfd)

    def attach(self, pidfd: int) -> None:
        """Takes over the pidfd of the process that was forked."""
        self.pidfd = pidfd

    def send(self, code: bytes) -> None:
        """Hands over a snippet to run."""
        if self._used:
            os.pwrite(self.stdout, bytes(self.max_stdout_bytes), 0)
        self._used = True
        os.pwrite(self.code, code, 0)
        with contextlib.suppress(OSError):  # where it died while idle the event follows
            self.socket.send(str(len(code)).encode())

    def rest(self) -> None:
        """Notes that it answered and has nothing to do from now on."""
        self.idle_since = time.monotonic()
        self.idle_cpu_s = self.cpu_time()

    def cpu_time(self) -> float:
        """CPU seconds used so far; 0 where it is not known."""
        try:
            if self._clock is None:
                pid = 0 if self.pidfd is None else pid_of(self.pidfd)
                if pid == 0:
                    return 0.0
                self._clock = (~pid << 3) | 2  # the kernel's number for the CPU clock of another process
            return time.clock_gettime(self._clock)
        except OSError:  # it has ended, or no descriptor is left
            return 0.0

    def printed(self) -> str:
        """What the last snippet printed, where the process did not come to say how much."""
        return read_all(self.stdout, self.max_stdout_bytes, 0).rstrip(b"\0").decode("utf-8", "replace")


def kill_process(pidfd: int) -> None:
    """Sends SIGKILL to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def read_all(fd: int, size: int, offset: int) -> bytes:
    """Exactly `size` bytes of shared memory, copied. ValueError where there are fewer."""
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            raise ValueError("short read")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _shared_memory(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def pid_of(pidfd: int) -> int:
    """The process behind a pidfd, 0 where it has ended."""
    fd = os.open(f"/proc/self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC)  # Path.read_text takes four times as long
    try:
        _, _, rest = os.read(fd, 4096).partition(b"\nPid:")
    finally:
        os.close(fd)
    return max(0, int(rest.split(None, 1)[0])) if rest else 0
