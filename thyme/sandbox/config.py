"""How the sandbox runs: every limit with its unit. Standard library only."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from thyme.limits import check_numbers

_MEMORY_CEILINGS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
BYTES_PER_PIXEL = 3
"""Of a returned picture on its way to the caller: RGB."""
_KEPT_PER_PIXEL = 4
"""Bytes of one that has come, as Pillow keeps it."""
_MEMORY_MIB = 2048
_SCRATCH_MIB = 192
_MAX_PIXELS = 64 << 20
_MEMORY_PER_PIXEL = 12
"""Bytes a snippet needs for each pixel it returns: its picture, the picture read back from the file, some room."""
_MOST_IMAGES = 256
_MOST_FILES = 1 << 20
"""As many as the kernel lets a process have open."""
_MOST_PROCESSES = 4000
"""One folder each in a file system of 4096."""
_DESCRIPTORS_PER_PROCESS = 5
_OTHER_DESCRIPTORS = 64

_DERIVED: Any = None
"""Stands in for a default that depends on other fields or on the machine until __post_init__ puts it in."""


def available_memory_mib() -> int:
    """RAM of the machine in MiB, or the container's ceiling where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _MEMORY_CEILINGS:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total >> 20


def _most_descriptors() -> int:
    """File descriptors this process may hold."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """Limits of a sandbox and how it isolates. All of them hold for every snippet.

    The defaults let a snippet open a photograph of 50 megapixels, rotate, resize or brighten the whole of it with
    Pillow or OpenCV and save it as JPEG or PNG. One worker may then take 2,496 MiB: `memory_mib` 2048, `scratch_mib`
    192, and 256 for the pixels it returns (4 bytes each of `max_pixels`). On a machine of 4 GiB that is one worker.

    Raises:
        ValueError: a limit is not positive, a choice is unknown, one limit cannot be reached because of another, or the
            workers together would take more than half of the machine's memory.
    """

    workers: int = _DERIVED
    """Snippets that run at the same time; sessions between two rounds do not count. Left out: twice the cores this
    process may use, less where half of the machine's memory or the file descriptors do not hold them."""
    timeout_s: float = 10.0
    """Wall-clock limit of one snippet in seconds (the original's 10); ends in SIGKILL."""
    session_timeouts: int = 20
    """CPU seconds of a session, as a multiple of what one snippet may use (timeout_s + 1)."""
    memory_mib: int = _DERIVED
    """Address space a snippet may add to what the warm interpreter maps, in MiB (RLIMIT_AS). Left out: 2048, less
    where half of the machine's memory does not hold one worker."""
    idle_s: float = 300.0
    """A session's process is killed after so many seconds without a snippet."""
    max_sessions: int = 128
    """Live session processes; a further session waits until one ends."""
    isolation: Literal["auto", "none"] = "auto"
    """"auto": every layer the machine offers, refusing without the core. "none": limits and a process only."""
    compat: Literal["none", "released"] = "none"
    """"released": rewrite code as the published Thyme sandbox did (64-pixel crops, eight decimals)."""
    scratch_mib: int = _SCRATCH_MIB
    """Disk a session may use, in MiB; one file may take all of it."""
    max_files: int = 256
    """Files and folders a session may make."""
    max_code_bytes: int = 128 * 1024
    """Longer snippets are refused."""
    max_stdout_bytes: int = 64 * 1024
    """Printed text beyond this is cut, with a marker."""
    max_error_bytes: int = 2048
    """Error messages are cut to this."""
    max_images: int = 8
    """Images one snippet may return."""
    max_pixels: int = _DERIVED
    """Pixels of all images one snippet returns. Left out: 64 Mi, less where memory_mib has no room for them."""
    max_aspect: float = 200.0
    """Longest side over shortest side of a returned image (the original's and Qwen2.5-VL's limit)."""
    preload: tuple[str, ...] = ()
    """Further modules snippets may import, beside numpy, PIL, cv2 and the standard library; loaded once, at start."""

    def __post_init__(self) -> None:
        have = available_memory_mib()
        self._check_values()
        self._derive(have)
        self._check_reach(have)

    @property
    def worker_mib(self) -> int:
        """What one running snippet may take in all, in MiB: memory, scratch, and the pixels it returns."""
        return self.memory_mib + self.scratch_mib + -(-self.max_pixels * _KEPT_PER_PIXEL >> 20)

    def _derive(self, have: int) -> None:
        """Puts in the defaults that depend on other fields and on the machine's memory, `have` MiB."""
        if self.memory_mib is None:
            pixels = _MAX_PIXELS if self.max_pixels is None else self.max_pixels
            rest = self.scratch_mib + (pixels * _KEPT_PER_PIXEL >> 20)
            wanted = max(_MEMORY_MIB, pixels * _MEMORY_PER_PIXEL >> 20)
            self._set("memory_mib", max(1, min(wanted, have // 2 // (self.workers or 1) - rest)))
        if self.max_pixels is None:
            self._set("max_pixels", max(1, min(_MAX_PIXELS, (self.memory_mib << 20) // _MEMORY_PER_PIXEL)))
        if self.workers is None:
            in_memory = have // 2 // max(1, self.worker_mib)
            in_descriptors = (_most_descriptors() - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_PROCESS - self.max_sessions
            self._set("workers", max(1, min(2 * len(os.sched_getaffinity(0)), in_memory, in_descriptors)))

    def _set(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        """Each limit that was given, by itself."""
        check_numbers(self, "SandboxConfig")
        for limit in fields(self):
            name, value = limit.name, getattr(self, limit.name)
            if limit.type in ("int", "float") and value is not None and not 0 < value < math.inf:
                raise ValueError(f"SandboxConfig.{name} must be positive and finite, got {value!r}")
        if self.isolation not in ("auto", "none"):
            raise ValueError(f"SandboxConfig.isolation must be 'auto' or 'none', got {self.isolation!r}")
        if self.compat not in ("none", "released"):
            raise ValueError(f"SandboxConfig.compat must be 'none' or 'released', got {self.compat!r}")
        if self.max_stdout_bytes < 256 or self.max_error_bytes > 8192:
            raise ValueError("SandboxConfig: max_stdout_bytes must be >= 256 and max_error_bytes <= 8192")
        if self.max_aspect < 1:
            raise ValueError(f"SandboxConfig.max_aspect must be at least 1 (a square), got {self.max_aspect!r}")
        if self.max_images > _MOST_IMAGES:
            raise ValueError(f"SandboxConfig.max_images must be at most {_MOST_IMAGES}, got {self.max_images}")
        for name in (self.preload,) if isinstance(self.preload, str) else self.preload:
            if (
                isinstance(self.preload, str)
                or not isinstance(name, str)
                or not all(part.isidentifier() for part in name.split("."))
            ):
                raise ValueError(
                    f"SandboxConfig.preload: {name!r} is no name of a module: give several as a list "
                    "(--sandbox.preload matplotlib scipy)"
                )

    def _check_reach(self, have: int) -> None:
        """No limit keeps another from being reached."""
        pixels = self.max_pixels * _MEMORY_PER_PIXEL
        if pixels > self.memory_mib << 20:
            raise ValueError(
                f"SandboxConfig: a snippet that returns max_pixels={self.max_pixels} needs {-(-pixels >> 20)} MiB, "
                f"more than memory_mib={self.memory_mib}: lower max_pixels or raise memory_mib"
            )
        if self.max_files > _MOST_FILES:
            raise ValueError(f"SandboxConfig.max_files must be at most {_MOST_FILES}, got {self.max_files}")
        for name in ("max_code_bytes", "max_stdout_bytes"):
            if getattr(self, name) > self.memory_mib << 20:
                raise ValueError(
                    f"SandboxConfig: {name}={getattr(self, name)} is more than memory_mib={self.memory_mib}: lower it "
                    "or raise memory_mib"
                )
        if self.max_images > self.max_files:
            raise ValueError(
                f"SandboxConfig: max_images={self.max_images} images do not fit into max_files={self.max_files} files: "
                "lower max_images or raise max_files"
            )
        processes = self.max_sessions + self.workers
        if processes > _MOST_PROCESSES:
            raise ValueError(
                f"SandboxConfig: max_sessions={self.max_sessions} and workers={self.workers} are more than "
                f"{_MOST_PROCESSES} processes: lower max_sessions"
            )
        descriptors = processes * _DESCRIPTORS_PER_PROCESS + _OTHER_DESCRIPTORS
        if descriptors > _most_descriptors():
            raise ValueError(
                f"SandboxConfig: max_sessions={self.max_sessions} and workers={self.workers} need {descriptors} file "
                f"descriptors, this process may open {_most_descriptors()}: lower max_sessions or raise `ulimit -n`"
            )
        need = self.workers * self.worker_mib
        if need > have // 2:
            raise ValueError(
                f"SandboxConfig: workers={self.workers} x (memory_mib={self.memory_mib} + scratch_mib="
                f"{self.scratch_mib} + max_pixels={self.max_pixels} x {_KEPT_PER_PIXEL} bytes) is {need} MiB, more "
                f"than half of the {have} MiB of memory here: lower workers or memory_mib"
            )
