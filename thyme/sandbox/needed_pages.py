"""Which pages a snippet's process needs, whatever the snippet: found out by having one run.

Then a parked child gets them all at once, while nobody waits, and not one by one while somebody does.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from thyme import _fork
from thyme.sandbox.birth import Requests
from thyme.sandbox.call_list import CallList, Given
from thyme.sandbox.errand import Errand
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.slots import Slots
from thyme.sandbox.template import Template

_PAGE = mmap.PAGESIZE
_ENTRY = 8
"""Bytes for each page in /proc/self/pagemap."""
_PRESENT, _OF_A_FILE, _ONLY_HERE = 1 << 63, 1 << 61, 1 << 56
_CODE = b"print(1)"
_PATIENCE_S = 10.0
_AROUND = 16 * _PAGE
"""Where a page of a file is read for the first time the kernel maps its neighbours, up to the next multiple."""
_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) r[w-][x-]p \S+ \S+ \S+ *([^\[].*|\[heap\]|)")


def ranges_of(proc: int) -> list[tuple[int, int]]:
    """(start, end) of what is mapped in this process, and so in each that is forked from it, but the stack and what
    the kernel adds."""
    with os.fdopen(os.open("self/maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        found = filter(None, map(_MAPPING.fullmatch, file.read().splitlines()))
    return [(int(match[1], 16), int(match[2], 16)) for match in found]


def pages_needed(
    ranges: Sequence[tuple[int, int]], proc: int, template: Template, requests: Requests, slots: Slots, plan: JailPlan
) -> bytes:
    """Has a child run a snippet as any other and returns the pages that it has by then.

    A piece is (start, size), packed; one of pages that are the child's own, or of size 0 for a page of a file, which it
    has together with its neighbours.

    Args:
        ranges: where to look.
        proc: descriptor of /proc.
        template: what forks the child.
        requests: what it is told.
        slots: where the child lives.
        plan: its jail.

    Raises:
        OSError: the child does not come to its end.
    """
    first = CallList()
    pagemap = first.add("open pagemap", _fork.SYS_openat, proc, b"self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    first.add("send", _fork.SEND_DESCRIPTORS, Given(0), pagemap)
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = [os.memfd_create("trial", os.MFD_CLOEXEC) for _ in range(3)]
    place, ruleset = slots.take(), plan.ruleset()
    open_fds = [*memory, *([] if ruleset < 0 else [ruleset])]
    try:
        if place.scratch is not None:
            plan.allow(ruleset, place.scratch, writable=True)
        given = [theirs.fileno()] if ruleset < 0 else [theirs.fileno(), ruleset]
        pid, pidfd = template.fork(requests.encode(place, early=False, first=first), given)
        open_fds.append(pidfd)
        theirs.close()  # so that its end is seen
        try:
            channel.settimeout(_PATIENCE_S)
            session.settimeout(_PATIENCE_S)
            open_fds += (received := socket.recv_fds(channel, 1, 1)[1])
            os.write(memory[2], _CODE)
            rest = [] if ruleset < 0 else [ruleset]
            fds = [memory[0], far_end.fileno(), memory[1], memory[2], *rest]
            socket.send_fds(channel, [Errand().encode()], fds)
            far_end.close()
            session.send(str(len(_CODE)).encode())
            if not received or not session.recv(1):
                raise ChildProcessError("the trial child has ended")
            return b"".join(struct.pack("=QQ", *piece) for piece in _pieces(_present(received[0], ranges)))
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            template.reap(pid)
    finally:
        slots.release(place)
        for fd in open_fds:
            os.close(fd)
        for end in (channel, theirs, session, far_end):
            end.close()


def pages_of(pagemap: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """The same of a child that is there: the pages of its own, which a copy of it will get.

    Args:
        pagemap: descriptor of its /proc/self/pagemap.
        ranges: where to look.
    """
    own = ((address, True) for address, is_own in _present(pagemap, ranges) if is_own)
    return b"".join(struct.pack("=QQ", *piece) for piece in _pieces(own))


def _present(pagemap: int, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    """Addresses of pages that are there, and whether no other process has them; without those that were copied into
    the process when it was forked."""
    for start, end in ranges:
        content = os.pread(pagemap, (end - start) // _PAGE * _ENTRY, start // _PAGE * _ENTRY)
        for number, (entry,) in enumerate(struct.iter_unpack("=Q", content)):
            own = entry & _ONLY_HERE and not entry & _OF_A_FILE
            if entry & _PRESENT and (own or entry & _OF_A_FILE):
                yield start + number * _PAGE, bool(own)


def _pieces(pages: Iterable[tuple[int, bool]]) -> list[list[int]]:
    """[start, size] of pages that are the process's own and lie side by side, and [start, 0] of one of each that lie
    around it."""
    pieces: list[list[int]] = []
    last = -1
    for address, own in pages:
        if not own:
            if address // _AROUND != last:
                pieces.append([address, 0])
            last = address // _AROUND
        elif pieces and pieces[-1][1] and sum(pieces[-1]) == address:
            pieces[-1][1] += _PAGE
        else:
            pieces.append([address, _PAGE])
    return pieces
