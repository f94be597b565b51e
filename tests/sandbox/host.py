"""The machine around the sandbox as tests see it: things worth stealing, listeners, processes; a crop must work."""

from __future__ import annotations

import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from thyme.sandbox import Sandbox, Status

_PYTHON = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, *sys.path) if p}
PYTHON_BELOW_TMP = tuple(sorted({"/".join(p.split("/")[:3]) for p in _PYTHON if p.startswith("/tmp/")}))
"""Where Python or a checkout lies below /tmp, a snippet sees the folder of its libraries there, read-only."""


def without_python(printed: str) -> str:
    """What a snippet printed, less the names of those folders in lists."""
    for path in PYTHON_BELOW_TMP:
        name = re.escape(repr(path.removeprefix("/tmp/")))
        printed = re.sub(rf", {name}|{name}, |{name}", "", printed)
    return printed


def picture(width: int = 120, height: int = 80) -> Image.Image:
    """Every pixel is different, so that a crop proves where it came from."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, (columns + rows) % 256], axis=-1).astype(np.uint8))


def children_of(pid: int) -> set[int]:
    """Every descendant of `pid`."""
    found: set[int] = set()
    pending = [pid]
    while pending:
        try:
            tasks = list(Path(f"/proc/{pending.pop()}/task").glob("*/children"))
        except OSError:  # the process ended while it was being listed
            continue
        for task in tasks:
            try:
                below = [int(word) for word in task.read_text().split()]
            except OSError:
                continue
            found |= set(below)
            pending += below
    return found


def facts(pid: int) -> dict[str, str]:
    """What /proc says of a process; nothing of one that has ended, as any that was listed may have by now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def named(pid: int, name: str) -> set[int]:
    """Descendants of `pid` that bear a name."""
    return {child for child in children_of(pid) if facts(child).get("Name") == name}


def snippets_of(pid: int) -> set[int]:
    """Descendants of `pid`, without the one that forks for the fork-server and the one kept ready for the next
    snippet."""
    ended_or_other = (None, "thyme-parked", "thyme-template")
    return {child for child in children_of(pid) if facts(child).get("Name") not in ended_or_other}


def server_of(sandbox: Sandbox) -> int:
    """The fork-server: in a pid namespace, the only child of the one that waits for it outside."""
    outer = sandbox._client.server.process.pid
    if not any(layer.name == "pid namespace" and layer.ok for layer in sandbox.layers()):
        return outer
    return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())


def resident_kib(pid: int) -> int:
    return int(facts(pid)["VmRSS"].split()[0])


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Waits for what happens on its own (a killed process being reaped)."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


@dataclass
class Host:
    """The machine around the sandbox, seen from outside."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    abstract_name: str

    def fill(self, code: str) -> str:
        """The code with names in braces filled in."""
        if "{" not in code:
            return code
        return code.format(
            secret=self.folder / "secret",
            folder=self.folder,
            port=self.tcp.getsockname()[1],
            unix=self.folder / "listener",
            abstract=self.abstract_name,
            pid=os.getpid(),
        )

    def facts(self) -> tuple:
        return tuple(
            (p.name, p.lstat().st_size, p.lstat().st_mtime_ns, p.lstat().st_mode) for p in sorted(self.folder.iterdir())
        )

    def was_called(self) -> bool:
        return bool(select.select([self.tcp, self.udp, self.unix, self.abstract], [], [], 0)[0])


CROP = """
im = Image.open(image_path).crop((10, 20, 40, 50))
im.save(temp_output_dir + 'crop.png')
print(temp_output_dir + 'crop.png')
"""


def check_crop(sandbox: Sandbox, image: Image.Image) -> None:
    """The sandbox still does its job."""
    for _ in range(3):  # a short time limit on a busy machine may need a second try
        result = sandbox.run(CROP, image)
        if result.status is not Status.TIMEOUT:
            break
    assert result.status is Status.OK, result
    assert len(result.images) == 1
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(image)[20:50, 10:40])
