"""Runs model-written Python where it can do no harm, and repairs what is trivially wrong with it.

Processes: the trainer holds a `Sandbox` (pool.py, client.py), which starts one fork-server with warm imports
(zygote_handle.py outside, zygote.py inside); each session is a forked, jailed child (child_handle.py outside, child.py
and interpreter.py inside). Never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thyme.sandbox.config import SandboxConfig
    from thyme.sandbox.pool import Sandbox, SandboxSession
    from thyme.sandbox.result import Fix, Layer, SandboxResult, SandboxUnavailable, SnippetError, Status

__all__ = ["Fix", "Layer", "Sandbox", "SandboxConfig", "SandboxResult", "SandboxSession", "SandboxUnavailable",
           "SnippetError", "Status"]  # fmt: skip

_HOME = {"SandboxConfig": "config", "Sandbox": "pool", "SandboxSession": "pool"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'result')}"), name)
