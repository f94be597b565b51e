"""What a snippet came to: statuses, fixes, results, and the error for a machine that cannot isolate."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image


class Status(enum.Enum):
    """How a snippet ended."""

    OK = "ok"
    """Ran to its end (or called sys.exit(0))."""
    ERROR = "error"
    """Uncaught exception, SyntaxError, or SystemExit with another code than 0."""
    TIMEOUT = "timeout"
    """Wall-clock or CPU limit."""
    MEMORY = "memory"
    """Uncaught MemoryError, or killed by the kernel for memory."""
    OUTPUT_LIMIT = "output_limit"
    """A hard cap on scratch space, files or images ended it. (Printed text over its cap is only cut.)"""
    CRASHED = "crashed"
    """Any other signal, or the process left early."""
    REFUSED = "refused"
    """Never started: closed session, too much code, shutdown."""


class Fix(NamedTuple):
    """One repair or leniency. `line` is 1-based in the snippet as it was written, 0 where it concerns the whole."""

    kind: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}." if self.line else f"{self.message[:1].upper()}{self.message[1:]}."


class SnippetError(NamedTuple):
    """An error as the model should read it. `line` is 1-based in the snippet as it was written, None if unknown."""

    type: str
    message: str
    line: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """What one snippet did. All but `status`, `wall_s`, `isolation` and `restarted` is the snippet's word."""

    status: Status
    stdout: str = ""
    error: SnippetError | None = None
    images: tuple[Image.Image, ...] = ()
    """RGB, in print or save order."""
    fixes: tuple[Fix, ...] = ()
    wall_s: float = 0.0
    """Seconds from handing the snippet to the session's process until its result arrived (or it was ended), by a
    monotonic clock and measured by the caller's side. Where the session had no process yet, forking and jailing one is
    included; waiting for a free worker is not. 0 where the snippet was never handed over."""
    isolation: str = ""
    """"full", "strong", "namespaces" or "none": see Sandbox.layers()."""
    restarted: bool = False
    """True where the session had lost its variables before this snippet (time-out, crash, idle limit)."""
    cpu_s: float = 0.0
    """CPU seconds the session has used so far; 0 where its process is gone and did not say."""
    peak_mib: float = 0.0
    """Peak resident memory of the session's process in MiB, the warm interpreter included; 0 where it did not come to
    say."""
    pixel_sums: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """CRC-32 of the RGB bytes of each image as it came; empty where nobody took them."""


class Layer(NamedTuple):
    """One layer or probe of the jail."""

    name: str
    ok: bool
    core: bool
    """True where the sandbox refuses to run without it."""
    detail: str


LIVE_FORK = "live fork"
"""The layer that says whether sessions are forked with their memory."""


def holds(layers: Sequence[Layer], name: str) -> bool:
    """Whether the layer of this name is there and in place."""
    return any(layer.name == name and layer.ok for layer in layers)


class SandboxUnavailable(RuntimeError):
    """The machine lacks what the sandbox needs. `layers` holds each layer and probe with errno and remedy."""

    def __init__(self, reason: str, layers: tuple[Layer, ...] = ()) -> None:
        self.layers = layers
        lines = [f"  {'ok  ' if x.ok else 'FAIL'} {x.name}: {x.detail}" for x in layers]
        super().__init__("\n".join([reason, *lines]))
