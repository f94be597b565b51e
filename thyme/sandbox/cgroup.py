"""One group for the fork-server and all its children, so that their memory and number are bounded in all.

Each child has limits of its own, but sessions between two rounds keep what they hold: 128 of them may hold 128 times
`memory_mib`. Where this process may make control groups below its own (version 1 or 2), the kernel bounds the sum and
ends the largest child when it is reached; elsewhere the layer is missing. Hardening, never a condition.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from thyme.sandbox.config import SandboxConfig, available_memory_mib
from thyme.sandbox.result import Layer

_IDLE_MIB = 32
"""What an ordinary session holds between two rounds: its copies of the warm pages and a few images."""
_NAME = re.compile(r"thyme-sandbox-(\d+)-[0-9a-f]+")
_END_S = 2.0


class Group:
    """The groups of one client, one in each hierarchy. What the machine does not give is missing; `layer()` says so."""

    def __init__(self, config: SandboxConfig, off: frozenset[str] = frozenset()) -> None:
        self.limit = 0
        """Bytes, known once the fork-server is warm."""
        self.num_processes = config.max_sessions + 2 * config.workers + 16
        self._config = config
        self._folders: dict[str, Path] = {}
        self._problem = "switched off" if "cgroup" in off else ""
        if not self._problem:
            self._try(self._make)

    @property
    def folders(self) -> list[Path]:
        """The groups that could be made; one where both controllers share a hierarchy."""
        return list(dict.fromkeys(self._folders.values()))

    def add(self, pid: int) -> None:
        """Moves a process in; what it forks is born there. It must not have forked yet."""
        for folder in self.folders:
            self._try(partial((folder / "cgroup.procs").write_text, str(pid)))

    def bound(self) -> None:
        """Sets the limit: what the warm fork-server holds now, and the budget of the snippets on top."""
        if self._folders and not self.limit:
            self._try(self._bound)

    def layer(self) -> Layer:
        """What the groups bound, or why there are none."""
        if self._problem:
            return Layer("cgroup", False, False, f"{self._problem}; what idle sessions hold has no bound in all")
        return Layer("cgroup", True, False, f"in all {self.limit >> 20} MiB and {self.num_processes} processes")

    def remove(self) -> None:
        """Takes the groups away as soon as the processes in them, which were killed, are gone."""
        _remove(self.folders)
        self._folders.clear()

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (OSError, ValueError) as error:
            self._problem = self._problem or str(error)

    def _make(self) -> None:
        homes, name = _homes(), f"thyme-sandbox-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        for controller in ("memory", "pids"):
            if controller not in homes:
                raise FileNotFoundError(f"no hierarchy of control groups has {controller!r}")
            home = homes[controller]
            _sweep(home)
            if (home / "cgroup.controllers").exists() and controller not in _words(home / "cgroup.subtree_control"):
                (home / "cgroup.subtree_control").write_text(f"+{controller}")
            (home / name).mkdir(exist_ok=True)
            self._folders[controller] = home / name
        (self._folders["pids"] / "pids.max").write_text(str(self.num_processes))

    def _bound(self) -> None:
        memory = self._folders["memory"]
        first = (memory / "memory.limit_in_bytes").exists()
        used = int((memory / ("memory.usage_in_bytes" if first else "memory.current")).read_text())
        limit = used + (budget_mib(self._config) << 20)
        (memory / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        self.limit = limit
        with contextlib.suppress(OSError):  # without swap accounting there is no such file
            if first:
                (memory / "memory.memsw.limit_in_bytes").write_text(str(self.limit))
            else:
                (memory / "memory.swap.max").write_text("0")


def leave(folders: Sequence[Path]) -> None:
    """Takes this process, the last one in, back to the groups above, and the groups at `folders` away."""
    for folder in folders:
        with contextlib.suppress(OSError):
            (folder.parent / "cgroup.procs").write_text("0")
    _remove(folders)


def budget_mib(config: SandboxConfig) -> int:
    """What snippets may hold in all, in MiB: `workers` that use all they may, and every session's ordinary rest."""
    return min(config.workers * config.worker_mib + config.max_sessions * _IDLE_MIB, available_memory_mib() * 3 // 4)


def spare(pid: int) -> None:
    """Has the kernel end others first when memory runs out: the fork-server, which all children need."""
    if os.geteuid() == 0:  # others may not lower it
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("900")


def _homes() -> dict[str, Path]:
    """Controller -> the group of this process in the hierarchy that has it."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        fields, (system, _, options) = place.split(), kind.split(" ", 2)
        if system in ("cgroup", "cgroup2"):
            for key in options.split(",") if system == "cgroup" else [""]:
                mounts.setdefault(key, (fields[4], fields[3]))
    homes: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for key in controllers.split(","):
            mount, root = mounts.get(key, ("", "/"))
            below = os.path.relpath(path, root)
            if not mount or below.startswith(".."):  # not mounted, or not that part of it
                continue
            home = Path(mount) / below
            for controller in [key] if key else _words(home / "cgroup.controllers"):
                homes.setdefault(controller, home)
    return homes


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _sweep(home: Path) -> None:
    """Removes groups whose client was killed together with its fork-server. One with processes in it stays: they are
    about to end."""
    for folder in home.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _removed(folder)


def _remove(folders: Sequence[Path]) -> None:
    until = time.monotonic() + _END_S
    for folder in folders:
        while not _removed(folder) and time.monotonic() < until:
            time.sleep(0.005)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
