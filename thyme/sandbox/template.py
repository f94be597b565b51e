"""The template: a copy of the warm fork-server that does nothing but fork, so that its memory stays as it was.

Whatever a process writes to while its children live is copied, and a huge page it writes to falls apart into 512 small
ones, each of which every later fork copies an entry for. The fork-server, which runs Python, would lose its huge pages
within some orders. So it asks this process, which waits in C (csrc/fork_service.cpp), to fork and to wait for what it
has forked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from thyme import _fork
from thyme.sandbox import jail
from thyme.sandbox.template_memory import mapped_bytes, settle

_ANSWER = struct.Struct("=ii")
_READY = b"ready"


Live = Callable[[bytes, bytes], NoReturn]


class Template:
    """The process that forks, as the fork-server holds it.

    Args:
        live: called in every child, once it is jailed, with the note that it was told and its order.
        leave: descriptors that only the fork-server is to have.
        proc: descriptor of /proc.
        memory_bytes: address space that a child may add to what it is born with; None for no limit.
        pages: what a child will write to, as `template_memory.pages_written` found it.

    Raises:
        OSError: there can be no further process.
        RuntimeError: the process ended before it could serve.
    """

    def __init__(
        self, live: Live, *, leave: Sequence[int], proc: int, memory_bytes: int | None, pages: bytes = b""
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._pid = jail.fork()
            if self._pid == 0:
                for fd in (*leave, self._socket.fileno()):
                    os.close(fd)
                _become(live, theirs, proc, memory_bytes, pages)
            self.pidfd = os.pidfd_open(self._pid)
        self._receive(len(_READY))

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        return self._socket.fileno()

    def fork(self, request: bytes, descriptors: Sequence[int]) -> tuple[int, int]:
        """Forks a child. Returns its id and a pidfd of it.

        Args:
            request: what birth.Requests encoded.
            descriptors: the socket that the order comes by and, with Landlock, the ruleset. The order brings stdout,
                session socket, pixels, code and the ruleset again.

        Raises:
            OSError: no process, memory or descriptor is left.
            RuntimeError: the template has ended.
        """
        with self._heard():
            socket.send_fds(self._socket, [b"f" + request], descriptors)
        answer, found = self._receive(_ANSWER.size)
        number = _ANSWER.unpack(answer)[0]
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        if not found:
            raise OSError("no descriptor left for a process")
        return number, found[0]

    def reap(self, pid: int) -> tuple[int, float]:
        """Waits for a child, which has ended or been killed. Returns its wait status and the CPU seconds it used.

        Raises:
            RuntimeError: the template has ended.
        """
        with self._heard():
            self._socket.send(b"r" + struct.pack("=i", pid))
        status, cpu_ms = _ANSWER.unpack(self._receive(_ANSWER.size)[0])
        return status, cpu_ms / 1000

    def stop(self) -> None:
        """Ends the process, and with it every child that is left."""
        self._socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _receive(self, size: int) -> tuple[bytes, list[int]]:
        with self._heard():
            message, found, _, _ = socket.recv_fds(self._socket, size, 1)
            if not message:
                raise BrokenPipeError
        return message, found

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError("the template process has ended") from error


def _become(live: Live, server: socket.socket, proc: int, memory_bytes: int | None, pages: bytes) -> NoReturn:
    """The forked side: the template, and later on each of its children."""
    exit_, code = os._exit, 0
    try:
        jail.set_name("thyme-template")
        jail.die_with_parent()
        settle(proc)
        if memory_bytes is not None:  # its children have the limit from it
            jail.limit([jail.address_space(mapped_bytes(proc) + memory_bytes)])
        server.send(_READY)
        told = _fork.serve(server.fileno(), pages)
        if told is not None:
            code = 3
            live(*told)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{error}\n".encode())
    finally:
        exit_(code)
