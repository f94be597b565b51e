"""A result, made of what a child sent, every field checked, or of how it ended: never believed beyond its snippet."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from thyme.sandbox.child_handle import ChildHandle, read_all
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.result import Fix, SandboxResult, SnippetError, Status

_STATUS = {"ok": Status.OK, "error": Status.ERROR, "memory": Status.MEMORY, "output_limit": Status.OUTPUT_LIMIT}


def read_result(
    frame: bytes, child: ChildHandle, *, config: SandboxConfig, isolation: str, wall_s: float, restarted: bool
) -> SandboxResult:
    """The result a child sent. Nothing of it lies where the child could change it any more.

    Args:
        frame: the message that came from its socket.
        child: where its printed text lies and its pictures arrive.
        config: the limits that everything it claims is held against.
        isolation: what isolates it, by SandboxResult's names.
        wall_s: seconds it took, measured on this side.
        restarted: whether the session had lost its variables before.

    Returns:
        The result, every field within the limits.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: it sent nonsense.
    """
    data = json.loads(frame.decode())
    status = _STATUS[data["status"]]
    length = _integer(data["stdout"], 0, config.max_stdout_bytes)
    error = None
    if data["error"] is not None:
        kind, message, line = data["error"]
        error = SnippetError(
            _text(kind, 200),
            _text(message, config.max_error_bytes),
            None if line is None else _integer(line, 0, 1 << 31),
        )
    fixes = tuple(Fix(_text(k, 50), _integer(n, 0, 1 << 31), _text(m, 400)) for k, n, m in data["fixes"][:64])
    pictures = child.pixels.take(data["images"])
    return SandboxResult(
        status=status,
        stdout=read_all(child.stdout, length, 0).decode("utf-8", "replace"),
        error=error,
        images=tuple(picture.image for picture in pictures),
        fixes=fixes,
        wall_s=wall_s,
        isolation=isolation,
        restarted=restarted,
        cpu_s=_number(data["cpu_s"]),
        peak_mib=_number(data["peak_mib"]),
        pixel_sums=tuple(picture.pixel_sum for picture in pictures),
    )


def how_it_ended(ended: dict[str, Any], config: SandboxConfig) -> tuple[Status, SnippetError]:
    """What a child's end means, from the fork-server's report: wait status, CPU seconds, whether for its scratch."""
    if "failed" in ended:
        return Status.REFUSED, SnippetError("OSError", f"no process could be started: {ended['failed']}", None)
    status = ended["status"]
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended["scratch"]:
        limit = f"more than {config.scratch_mib} MiB or {config.max_files} files in the working folder"
        return Status.OUTPUT_LIMIT, SnippetError("OutputLimit", limit, None)
    if number == signal.SIGXCPU or (number == signal.SIGKILL and ended["cpu_s"] >= config.timeout_s):
        return Status.TIMEOUT, SnippetError("TimeoutError", "the session used up its CPU time", None)
    if number == signal.SIGKILL:
        return Status.MEMORY, SnippetError("MemoryError", "killed by the system for want of memory", None)
    if number:
        known = number in list(signal.Signals)  # not those between SIGRTMIN and SIGRTMAX
        name = signal.Signals(number).name if known else f"signal {number}"
        return Status.CRASHED, SnippetError("Crash", f"the interpreter died of {name}", None)
    code = os.WEXITSTATUS(status)
    return Status.CRASHED, SnippetError("Crash", f"the process left early with code {code}", None)


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"number out of range: {value!r}"[:80])
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError("number out of range")
    return float(value)


def _text(value: Any, limit: int) -> str:
    if type(value) is not str:
        raise ValueError("text expected")
    return value.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
