"""What an exception of a snippet means, in words that help a model to write the next one."""

from __future__ import annotations

import errno
import socket

from thyme.sandbox import paths
from thyme.sandbox.config import SandboxConfig
from thyme.sandbox.preload import is_left_out
from thyme.sandbox.result import SnippetError


def runtime_error(problem: BaseException, filename: str, config: SandboxConfig, image_path: str) -> SnippetError:
    """The error of a snippet that was running.

    Args:
        problem: what it did not catch.
        filename: what the snippet was compiled as.
        config: the limits it may have met.
        image_path: the path of the input image as it was told.
    """
    kind = str(getattr(type(problem), "__name__", "Exception"))
    return SnippetError(kind, _explained(problem, config, image_path), line_of(problem, filename))


def syntax_error(problem: BaseException, original: str) -> SnippetError:
    """The error of a snippet that does not compile: as it was written, not half repaired."""
    try:
        compile(original, "<snippet>", "exec")
    except SyntaxError as first:
        problem = first
    except (ValueError, RecursionError):
        pass
    if isinstance(problem, SyntaxError):
        return SnippetError(type(problem).__name__, problem.msg or "invalid syntax", problem.lineno)
    return SnippetError(type(problem).__name__, text_of(problem), None)


def memory_error(config: SandboxConfig, detail: str = "", line: int | None = None) -> SnippetError:
    """The error of a snippet that ran out of memory."""
    message = f"the snippet used more than {config.memory_mib} MiB" + (f" ({detail})" if detail else "")
    return SnippetError("MemoryError", message, line)


def is_full(problem: BaseException) -> bool:
    """Whether the scratch had no room for what was to be written."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EFBIG)


def text_of(problem: BaseException) -> str:
    """The message, also where it cannot be had."""
    try:
        return str(problem)
    except BaseException:  # the snippet's own __str__
        return "(no message)"


def line_of(problem: BaseException, filename: str) -> int | None:
    """The innermost line of the snippet that was running; None where there is none."""
    line, trace = None, problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _explained(problem: BaseException, config: SandboxConfig, image_path: str) -> str:
    message = text_of(problem)
    if isinstance(problem, ImportError):
        available = ", ".join(("numpy", "PIL", "cv2", *config.preload))
        if is_left_out(problem.name):
            return f"{problem.name!r} is not in the sandbox (available: {available}, most of the standard library)"
        return f"{message} (available: {available} and the standard library)"
    if is_full(problem):
        return f"{message} (at most {config.scratch_mib} MiB and {config.max_files} files and folders)"
    cause = getattr(problem, "reason", problem) if isinstance(problem, OSError) else problem  # of a URLError
    if isinstance(cause, socket.gaierror):
        return f"{message} (there is no network)"
    if isinstance(cause, PermissionError):
        return f"{message} (allowed: reading {image_path!r}, writing below {paths.HOME!r}; no network)"
    if isinstance(problem, RuntimeError) and "start new thread" in message:
        return f"{message} (threads and processes are not available)"
    return message
