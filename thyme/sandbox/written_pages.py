"""Which pages a snippet's process will write to, whatever the snippet: found out by running one."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

from thyme.sandbox import jail
from thyme.sandbox.template_memory import private_mappings

_PAGE = mmap.PAGESIZE
_ENTRY = 8
"""Bytes for each page in /proc/self/pagemap."""
_PRESENT, _OF_A_FILE, _ONLY_HERE = 1 << 63, 1 << 61, 1 << 56


def pages_written(proc: int, step: Callable[[], object]) -> bytes:
    """The pages of this process, which has one thread, that a fork of it writes to in `step`, packed for C as
    (start, size): what a child will write to can be made its own all at once, while nobody waits.

    Args:
        proc: descriptor of /proc.
        step: what the fork does.
    """
    ranges = [(mapping.start, mapping.end) for mapping in private_mappings(proc) if mapping.rights == "rw-p"]
    read_end, write_end = os.pipe()
    pid = jail.fork()
    if pid == 0:
        try:
            step()
            pagemap = os.open("self/pagemap", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
            found = [os.pread(pagemap, (b - a) // _PAGE * _ENTRY, a // _PAGE * _ENTRY) for a, b in ranges]
            with os.fdopen(write_end, "wb") as file:
                file.write(b"".join(found))
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    pieces: list[list[int]] = []
    addresses = (address for start, end in ranges for address in range(start, end, _PAGE))
    for address, (entry,) in zip(addresses, struct.iter_unpack("=Q", content), strict=False):
        if not entry & _PRESENT or entry & _OF_A_FILE or not entry & _ONLY_HERE:
            continue
        if pieces and sum(pieces[-1]) == address:
            pieces[-1][1] += _PAGE
        else:
            pieces.append([address, _PAGE])
    return b"".join(struct.pack("=QQ", *piece) for piece in pieces)
