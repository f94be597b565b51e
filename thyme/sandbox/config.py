"""How the sandbox runs: every limit with its unit. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

_MEMORY_CEILINGS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory_mib() -> int:
    """RAM of the machine in MiB, or the container's ceiling where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _MEMORY_CEILINGS:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total >> 20


def default_workers() -> int:
    """Twice the cores this process may use, less where half of the memory would not hold them at 1 GiB each."""
    return max(1, min(2 * len(os.sched_getaffinity(0)), available_memory_mib() // 2 // 1024))


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """Limits of a sandbox and how it isolates. All of them hold for every snippet.

    Raises:
        ValueError: a limit is not positive, a choice is unknown, or the workers together would take more than half of
            the machine's memory.
    """

    workers: int = field(default_factory=default_workers)
    """Snippets that run at the same time; sessions between two rounds do not count."""
    timeout_s: float = 10.0
    """Wall-clock limit of one snippet in seconds (the original's 10); ends in SIGKILL."""
    memory_mib: int = 1024
    """Address space a snippet may add to what the warm interpreter maps, in MiB (RLIMIT_AS)."""
    idle_s: float = 300.0
    """A session's process is killed after so many seconds without a snippet."""
    max_sessions: int = 128
    """Live session processes; a further session waits until one ends."""
    isolation: Literal["auto", "none"] = "auto"
    """"auto": every layer the machine offers, refusing without the core. "none": limits and a process only."""
    compat: Literal["none", "released"] = "none"
    """"released": rewrite code as the published Thyme sandbox did (64-pixel crops, eight decimals)."""
    scratch_mib: int = 32
    """Disk a session may use, in MiB."""
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
    max_pixels: int = 16 * 1024 * 1024
    """Pixels of all images one snippet returns."""
    max_aspect: float = 200.0
    """Longest side over shortest side of a returned image (the original's and Qwen2.5-VL's limit)."""
    preload: tuple[str, ...] = ()
    """Further modules snippets may import, beside numpy, PIL, cv2 and the standard library; loaded once, at start."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            name, value = limit.name, getattr(self, limit.name)
            if limit.type in ("int", "float") and not value > 0:
                raise ValueError(f"SandboxConfig.{name} must be positive, got {value!r}")
        if self.isolation not in ("auto", "none"):
            raise ValueError(f"SandboxConfig.isolation must be 'auto' or 'none', got {self.isolation!r}")
        if self.compat not in ("none", "released"):
            raise ValueError(f"SandboxConfig.compat must be 'none' or 'released', got {self.compat!r}")
        if self.max_stdout_bytes < 256 or self.max_error_bytes > 8192:
            raise ValueError("SandboxConfig: max_stdout_bytes must be >= 256 and max_error_bytes <= 8192")
        need, have = self.workers * self.memory_mib, available_memory_mib()
        if need > have // 2:
            raise ValueError(
                f"SandboxConfig: workers={self.workers} x memory_mib={self.memory_mib} is {need} MiB, more than half "
                f"of the {have} MiB of memory here: lower workers or memory_mib"
            )
