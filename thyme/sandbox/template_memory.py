"""The memory of the template, put in order once, so that a fork has little to copy and an exit little to take down.

A fork enters every anonymous page of the parent into the child, which takes each of them out again at its end: nine
thousand for the warm interpreter. Two ways out. Where two megabytes are full and aligned, one huge page is one entry
(`gather_arenas` sees to it that what the interpreter allocates lies that way). All the rest, the data of a hundred
libraries above all, becomes a private mapping of a sealed memory file, which a fork does not copy at all.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from thyme import _fork

_MADV_COLLAPSE, _HUGE = 25, 2 << 20
_ARENA_BYTES = 64 << 20
"""More than the warm interpreter's small objects take; what is not used is given back."""
_MOST_UNTOUCHED = 4 << 20
"""Of a mapping that is shared: each untouched page of it would become one of the file."""
_HEADER = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) \S+ \S+ \S+ *(.*)")
_FILE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) ([0-9a-f]+) (\S+ [1-9]\d* +/.*)")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Mapping(NamedTuple):
    start: int
    end: int
    rights: str
    name: str
    anonymous: int
    """Bytes of it that are this process's own."""


def gather_arenas() -> None:
    """Has what the interpreter allocates from now on lie side by side. To be called before much is loaded."""
    _fork.gather_arenas(_ARENA_BYTES)


def end_gathering() -> None:
    """Gives back what is left of the room for that. To be called when all is loaded."""
    _fork.close_region()


def mapped_bytes(proc: int) -> int:
    """The address space of the calling process."""
    with os.fdopen(os.open("self/statm", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def settle(proc: int) -> None:
    """Puts the memory of the calling process, which has one thread, in order. Nothing in it changes.

    Args:
        proc: descriptor of /proc.
    """
    huge: set[int] = set()
    for mapping in _private(proc):
        if mapping.rights == "rw-p" and mapping.name in ("", "[heap]"):
            huge |= _collapse(mapping)
    ranges = [
        (start, end - start, _protection(mapping.rights))
        for mapping in _private(proc)
        if mapping.end - mapping.start - mapping.anonymous <= _MOST_UNTOUCHED
        for start, end in _without(huge, mapping)
    ]
    _fork.share_pages(b"".join(struct.pack("=QQQ", *numbers) for numbers in ranges))
    _join_code(proc)


def _join_code(proc: int) -> None:
    """Makes one mapping of a library's code and the constants on its both sides, by giving them the same rights: a fork
    copies each mapping by itself, and an exit takes it down."""
    with os.fdopen(os.open("self/maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        found = [_FILE.fullmatch(line) for line in file.read().splitlines()]
    for one, two in itertools.pairwise(found):
        if one is None or two is None or one[5] != two[5] or {one[3], two[3]} != {b"r--p", b"r-xp"}:
            continue
        start, end, offset, after, after_offset = (int(n, 16) for n in (one[1], one[2], one[4], two[1], two[4]))
        if end == after and offset + end - start == after_offset:
            constants = one if one[3] == b"r--p" else two
            begin, stop = int(constants[1], 16), int(constants[2], 16)
            _libc.mprotect(begin, stop - begin, mmap.PROT_READ | mmap.PROT_EXEC)


def _private(proc: int) -> list[_Mapping]:
    """The mappings that hold pages of the process's own, without its stack and what the kernel maps."""
    with os.fdopen(os.open("self/smaps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        lines = file.read().splitlines()
    found: list[_Mapping] = []
    for line in lines:
        if header := _HEADER.fullmatch(line):
            start, end = (int(header[n], 16) for n in (1, 2))
            found.append(_Mapping(start, end, header[3].decode(), os.fsdecode(header[4]), 0))
        elif line.startswith(b"Anonymous:"):
            found[-1] = found[-1]._replace(anonymous=int(line.split()[1]) << 10)
    return [
        mapping
        for mapping in found
        if mapping.anonymous
        and mapping.rights[0] + mapping.rights[3] == "rp"
        and (mapping.name == "[heap]" or not mapping.name.startswith("["))
    ]


def _collapse(mapping: _Mapping) -> set[int]:
    """Backs what fills huge pages by huge pages, and returns their addresses: none where the kernel does not offer it
    (before Linux 6.1)."""
    start, end = -(-mapping.start // _HUGE) * _HUGE, mapping.end // _HUGE * _HUGE
    if start >= end or 2 * mapping.anonymous < end - start:
        return set()
    _libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)
    return {at for at in range(start, end, _HUGE) if _libc.madvise(at, _HUGE, _MADV_COLLAPSE) == 0}


def _without(huge: set[int], mapping: _Mapping) -> Iterator[tuple[int, int]]:
    """What is left of a mapping between its huge pages."""
    start = mapping.start
    for address in sorted(huge):
        if mapping.start <= address < mapping.end:
            if start < address:
                yield start, address
            start = address + _HUGE
    if start < mapping.end:
        yield start, mapping.end


def _protection(rights: str) -> int:
    """PROT_* of "rwx"."""
    return sum(1 << bit for bit, right in enumerate(rights[:3]) if right != "-")
