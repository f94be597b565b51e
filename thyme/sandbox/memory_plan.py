"""How a fresh child gets the memory of another one: which mappings it must make, and where it must look for pages.

Both were forked from one template, so nearly all of their mappings are the same, of the same content except for the
pages that one of them wrote to. The plan is followed by C in the child that becomes the copy (csrc/fork_restore.cpp).
It comes in two halves: to copy what the original wrote to of what any child has mapped, which is the same for every
fork, and takes most of the time; and what it has mapped otherwise, which is found out meanwhile.
What is read here the kernel wrote; the process it is about may be anybody's, and can only spoil its own copy.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from thyme import _fork

TO_BE_COPY = b"restore\0"
"""The order that has a child wait for a plan: csrc/fork_restore.hpp."""
_STEP = struct.Struct("=QQq")
_Step = tuple[int, int, int]
"""Start, size, what is done: csrc/fork_restore.hpp."""
_UNMAP, _MAP, _COPY, _BREAK, _GROW = -1, -2, -3, -4, -5
_READ_WRITE, _EXECUTE = 3, 4
_GROWING = (b"[heap]", b"[stack]")
"""What the kernel makes longer and shorter by itself."""
_MOST_BYTES = 512 * 1024
"""Of a list of mappings: some four thousand."""
_MOST_STEPS = 4000
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([ps]) ([0-9a-f]+) (\S+) (\d+) *(.*)")


class CannotCopy(OSError):
    """The memory of this process is such that no other one can have it."""


class _Mapping(NamedTuple):
    start: int
    end: int
    rights: int
    """PROT_* of mmap."""
    file: tuple[bytes, bytes, int] | None
    """Device, inode and where in it address 0 would lie; None where it is of no file."""
    shared: bool
    name: bytes


class Baseline:
    """What is mapped in a child that has no order yet: the same in each of them, but how far down the stack reaches.

    Args:
        maps: descriptor of /proc/self/maps of such a child.

    Raises:
        CannotCopy: there are too many mappings.
    """

    def __init__(self, maps: int) -> None:
        self.lines = frozenset(_lines(maps))
        self.heap_end = _heap_end(self.lines)
        copies = _copies(_parsed(line for line in self.lines if b" rw-p " in line))
        self.writable = [(start, start + size) for start, size, _ in copies]
        """(start, end) of what may have been written to."""
        self.plan = _encoded(copies)
        """The first half of any plan."""


def plan_of(maps: int, baseline: Baseline) -> bytes:
    """The second half of the plan by which a child becomes the copy of another.

    Args:
        maps: descriptor of /proc/self/maps of the original, which holds still.
        baseline: what the child has mapped.

    Raises:
        CannotCopy: it has mapped what the child cannot map.
    """
    theirs = set(_lines(maps))
    heap_end = _heap_end(theirs)
    steps = [(heap_end, 0, _BREAK)] if heap_end != baseline.heap_end else []
    steps += _around_service(_adjusted(_parsed(theirs - baseline.lines), _parsed(baseline.lines - theirs)))
    return _encoded(steps)


def _encoded(steps: Sequence[_Step]) -> bytes:
    if len(steps) > _MOST_STEPS:
        raise CannotCopy(f"{len(steps)} steps to copy its memory, more than {_MOST_STEPS}")
    return struct.pack("=Q", len(steps)) + b"".join([_STEP.pack(*step) for step in steps])


def _copies(mappings: Sequence[_Mapping]) -> list[_Step]:
    return _around_service((m.start, m.end - m.start, _COPY) for m in mappings)


def _lines(descriptor: int) -> list[bytes]:
    content, offset = [], 0
    while part := os.pread(descriptor, 1 << 16, offset):
        content.append(part)
        offset += len(part)
        if offset > _MOST_BYTES:
            raise CannotCopy("it has too many mappings")
    return b"".join(content).splitlines()


def _parsed(lines: Iterable[bytes]) -> list[_Mapping]:
    found = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise CannotCopy("a mapping that is not understood")
        start, end, offset = (int(match[n], 16) for n in (1, 2, 7))
        rights = (match[3] == b"r") + 2 * (match[4] == b"w") + 4 * (match[5] == b"x")
        file = (match[8], match[9], offset - start) if match[9] != b"0" else None
        found.append(_Mapping(start, end, rights, file, match[6] == b"s", match[10]))
    return sorted(found)


def _heap_end(lines: Iterable[bytes]) -> int:
    return max((mapping.end for mapping in _parsed(line for line in lines if line.endswith(b"[heap]"))), default=0)


def _adjusted(theirs: Sequence[_Mapping], ours: Sequence[_Mapping]) -> Iterable[_Step]:
    """Steps after which what differs is mapped as in the original, with the original's pages."""
    starts, own_starts = [m.start for m in theirs], [m.start for m in ours]
    edges = sorted({edge for mapping in (*theirs, *ours) for edge in (mapping.start, mapping.end)})
    for start, end in pairwise(edges):
        yield from _piece(start, end, _at(theirs, starts, start), _at(ours, own_starts, start))


def _piece(start: int, end: int, want: _Mapping | None, have: _Mapping | None) -> Iterable[_Step]:
    size = end - start
    if want is None:
        if have is not None and have.name not in _GROWING:
            yield start, size, _UNMAP
        return
    same = have is not None and have.file == want.file and have.shared == want.shared
    if want.shared or want.rights & _EXECUTE or (want.file is not None and not same):
        if same and have is not None and have.rights == want.rights:
            return
        raise CannotCopy("it has mapped a file or shared memory")
    if have is None and want.name == b"[stack]":
        yield start, 0, _GROW
    elif have is None and want.name == b"[heap]":
        pass  # the heap ends there by now
    elif not same:
        yield start, size, _MAP
    elif have is not None and have.rights != _READ_WRITE:
        yield start, size, _READ_WRITE
    if have is None or not same or have.rights != _READ_WRITE:  # else it was copied by the first half
        yield start, size, _COPY
    if want.rights != _READ_WRITE:
        yield start, size, want.rights


def _at(mappings: Sequence[_Mapping], starts: Sequence[int], address: int) -> _Mapping | None:
    place = bisect_right(starts, address) - 1
    return mappings[place] if place >= 0 and address < mappings[place].end else None


def _around_service(steps: Iterable[_Step]) -> list[_Step]:
    """The steps, less what lies where the copy works."""
    low, size = _fork.SERVICE
    high, found = low + size, []
    for start, length, what in steps:
        end = start + length
        if end <= low or start >= high:
            found.append((start, length, what))
            continue
        found += [(a, b - a, what) for a, b in ((start, min(end, low)), (max(start, high), end)) if a < b]
    return found
