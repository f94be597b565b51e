"""Proves the jail by doing: a child of our own puts it on and tries what snippets must not be able to do."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thyme.sandbox import jail
from thyme.sandbox.birth import CHANNEL, confine, prepare
from thyme.sandbox.call_list import CallList
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.plan import JailPlan
from thyme.sandbox.result import Layer
from thyme.sandbox.slots import Slots

_REPORT_BYTES = 64 * 1024
_PATIENCE_S = 10.0


def probe(slots: Slots, plan: JailPlan, config: SandboxConfig, canary: Path) -> list[Layer]:
    """Forks a child, jails it and lets it try to get out.

    Args:
        slots: where the child gets its scratch folder.
        plan: the jail it is put into.
        config: the sandbox's limits.
        canary: a file outside that it tries to read and write.

    Returns:
        A layer for each attempt, `ok` where it was refused; a single one where the jail could not be put on.
    """
    place = slots.take()
    ruleset = plan.ruleset()
    if place.scratch is not None:
        plan.allow(ruleset, place.scratch, writable=True)
    read_end, write_end = os.pipe()
    pid = jail.fork()
    if pid == 0:
        given = [write_end] if ruleset < 0 else [write_end, ruleset]
        report: Any = ""
        try:
            prepare(plan, config, place.scratch, num_kept=len(given), reports=False).make(
                given, plan.uid_of(place.slot)
            )
            last = CallList()
            confine(last, plan, CHANNEL + 1)
            last.make()
            report = _attempt_escapes(canary)
        except OSError as error:
            report = f"{error}"
        finally:
            for fd in (write_end, CHANNEL):  # where it was and where `prepare` puts it
                with contextlib.suppress(OSError):
                    os.write(fd, json.dumps(report).encode())
                    break
            os._exit(0)
    os.close(write_end)
    if ruleset >= 0:
        os.close(ruleset)
    ready, _, _ = select.select([read_end], [], [], _PATIENCE_S)
    answer = os.read(read_end, _REPORT_BYTES) if ready else b""
    os.close(read_end)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    slots.release(place)
    return _layers(json.loads(answer) if answer else "the probe died before it could report")


def _layers(report: Any) -> list[Layer]:
    if isinstance(report, str):
        return [Layer("putting on the jail", False, True, report)]
    return [
        Layer(f"probe: {attempt}", code != 0, True, f"refused ({os.strerror(code)})" if code else "NOT refused")
        for attempt, code in report
    ]


def _attempt_escapes(canary: Path) -> list[tuple[str, int]]:
    """Tries, inside a finished jail, what it must refuse. Returns (attempt, errno), 0 where it was not."""
    attempts: dict[str, Callable[[], object]] = {
        "read a file outside": canary.read_bytes,
        "write a file outside": lambda: canary.open("ab").close(),
        "read /etc/passwd": Path("/etc/passwd").read_bytes,
        "open a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
        "open a unix socket": socket.socketpair,
        "start a process": _start_a_process,
        "signal another process": lambda: os.kill(os.getppid(), 0),
        "enter a namespace": lambda: jail.unshare(jail.CLONE_NEWUSER),
        "map executable memory": jail.map_executable_memory,
        "mount": lambda: jail.mount("tmpfs", "/mnt", "tmpfs", 0),
        "hold a capability": _hold_a_capability,
    }
    outcome = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            outcome.append((name, error.errno or 1))
        else:
            outcome.append((name, 0))
    return outcome


def _start_a_process() -> None:
    if os.fork() == 0:
        os._exit(0)


def _hold_a_capability() -> None:
    if jail.capabilities() == 0:
        raise PermissionError(1, "no capabilities")
