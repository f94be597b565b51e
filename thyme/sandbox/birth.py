"""What a child does before it runs any Python: most of the jail, the wait for its order, the rest of the jail.

Two lists of system calls, which the fork-server composes and the child makes in C (call_list.py). Nothing untrusted is
read in between: up to the order the child has seen only what the fork-server made, and the order, which the
fork-server hands on, brings the first descriptor that leads to code. That is read after the second list.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from thyme import _fork
from thyme.sandbox import jail, paths
from thyme.sandbox.call_list import Argument, CallList, Given, Parameter
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.root import Image, Layout
from thyme.sandbox.slots import Place

STDOUT, SOCKET, PIXELS, CODE = 1, 3, 4, 5
"""Where what comes with an order lies from then on: printed text, the session's socket, pixels, code."""
CHANNEL = 3
"""Where the socket to the fork-server lies until then."""
_PLACES = (STDOUT, SOCKET, PIXELS, CODE)
_FOLDERS = ("/data", "/data" + paths.HOME_BELOW.rstrip("/"), "/tmp", "/input")
_HEADER = struct.Struct("=qiiiIII")


def make_places(scratch: str) -> None:
    """Makes the folders of a scratch on a disk."""
    for name in _FOLDERS:
        os.mkdir(scratch + name, 0o700)  # noqa: PTH102


def places_of(scratch: str | None) -> dict[str, str]:
    """The folders of the scratch as snippets know them -> where they are, but the folder of the image."""
    if scratch is None:
        return {paths.DATA: paths.DATA, paths.TMP: paths.TMP}
    return {paths.DATA: scratch + "/data", paths.TMP: scratch + "/tmp"}


def prepare(
    plan: JailPlan,
    config: SandboxConfig,
    scratch: str | None,
    *,
    num_kept: int = 1,
    layout: Layout | None = None,
    enters: bool = False,
    reports: bool = True,
    first: CallList | None = None,
) -> CallList:
    """The layers that need no order. The parameter of the list is the user id, where the plan gives children one.

    Args:
        plan: what the machine offers.
        config: the limits.
        scratch: the folder of the scratch on a disk; None where it is in the child's own root.
        num_kept: how many of the descriptors given stay, as 3, 4, ...; 0, 1 and 2 become /dev/null, all others are
            closed. The second one given is, with Landlock, the ruleset, to which the child's own scratch is added.
        enters: whether the second one is the mount namespace of a root instead, which the child enters in place of
            making one, and whose ruleset it gets with its order.
        layout: what the root is made of where that is not the usual.
        reports: whether the first one given is a socket, which gets the mount namespace of a child that has made a
            root, and what its memory is read through.
        first: calls that are made before.
    """
    calls = CallList() if first is None else first
    jail.set_name("thyme-parked", calls.add)
    jail.first_to_end(calls, plan.proc)
    if plan.root is not None:
        if enters:
            plan.root.enter(calls, Given(1))
        else:
            plan.root.build(calls, config, layout, owned=plan.uid_base != 0)
            if plan.abi:
                for folder in (paths.DATA, paths.TMP):
                    jail.landlock_allow_own(calls, Given(1), folder, plan.abi)
            if reports:
                plan.root.report(calls, Given(0))
        if reports and plan.forks_live:
            report_memory(calls, plan.proc)
    # first out of the way, then into place: a source may sit where another belongs
    kept: list[Argument] = [plan.null, plan.null, plan.null, *map(Given, range(num_kept))]
    sources = [calls.add("dup", _fork.SYS_dup, source) for source in kept]
    for number, source in enumerate(sources):
        calls.add("dup3", _fork.SYS_dup3, source, number, os.O_CLOEXEC)
    calls.add("close", _fork.CLOSE_FROM, len(kept))
    jail.limit(plan.limits, calls.add)
    if plan.uid_base:
        jail.become(Parameter(), calls.add)
    jail.die_with_parent(calls.add)
    jail.no_new_privs(calls.add)
    jail.not_dumpable(calls.add)
    if plan.drop:
        jail.drop_capabilities(calls.add)
    if scratch is not None:
        for name in _FOLDERS:
            calls.add("mkdir", _fork.SYS_mkdirat, jail.AT_FDCWD, os.fsencode(scratch + name), 0o700)
    home = places_of(scratch)[paths.DATA] + paths.HOME_BELOW
    calls.add("chdir", _fork.SYS_chdir, os.fsencode(home))
    return calls


def report_memory(calls: CallList, proc: int) -> None:
    """Has a list of calls send, over the first descriptor given, what the memory of its process can be read through
    from then on, by whoever holds it: /proc/self/maps, pagemap and mem. Opened by the process itself: no other one may,
    once it is jailed. Where that cannot be, it is not forked with its memory."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    files = [
        calls.add(f"open {name}", _fork.SYS_openat, proc, f"self/{name}".encode(), flags, may_fail=True)
        for name in ("maps", "pagemap", "mem")
    ]
    calls.add("send", _fork.SEND_DESCRIPTORS, Given(0), *files, may_fail=True)
    for file in files:
        calls.add("close", _fork.SYS_close, file, may_fail=True)


def confine(calls: CallList, plan: JailPlan, ruleset: Argument) -> None:
    """Adds the layers that come last to a list: which files, then which system calls."""
    if plan.abi:
        jail.landlock_restrict(ruleset, calls.add)
    if plan.seccomp is not None:
        plan.seccomp.install(calls.add)


def take_order(plan: JailPlan) -> CallList:
    """What is left of the jail, and then what came with the order in its place. All other descriptors are closed next
    (csrc/fork_service.cpp)."""
    calls = CallList()
    jail.set_name("thyme-snippet", calls.add)
    confine(calls, plan, Given(len(_PLACES)))
    for number, place in enumerate(_PLACES):
        calls.add("dup3", _fork.SYS_dup3, Given(number), place, os.O_CLOEXEC)
    return calls


class Requests:
    """What the template is told of a child.

    Args:
        plan: what the machine offers.
        config: the limits.
    """

    def __init__(self, plan: JailPlan, config: SandboxConfig) -> None:
        self._plan, self._config = plan, config
        self._after = take_order(plan).encode()
        self._num_descriptors = len(_PLACES) + (plan.abi != 0)
        self._usual = prepare(plan, config, None).encode() if plan.rooted else b""
        self._entering = prepare(plan, config, None, enters=True).encode() if plan.rooted else b""

    def encode(
        self, place: Place, images: Sequence[Image] = (), *, early: bool, first: CallList | None = None
    ) -> bytes:
        """The message (csrc/fork_service.hpp).

        Args:
            place: where the child lives. It is told where its scratch is. In a kept root, whose mount namespace is
                given to it beside the channel, it makes no calls before and has no images that this has no room for.
            images: that its root must have room for.
            early: whether there is time to make its memory ready before its order.
            first: calls that it makes before all others.

        Raises:
            OSError: too many system calls are needed.
        """
        before, root = self._usual if place.root is None else self._entering, self._plan.root
        fits = root is None or all(map(root.has_room_for, images))
        if root is None or not fits or first is not None:
            layout = None if root is None or fits else root.layout(*images)
            before = prepare(self._plan, self._config, place.scratch, layout=layout, first=first).encode()
        uid, sizes = self._plan.uid_of(place.slot), (len(before), len(self._after))
        header = _HEADER.pack(uid, CHANNEL, self._num_descriptors, early, *sizes, CODE + 1)
        return b"".join((header, before, self._after, (place.scratch or "").encode()))
