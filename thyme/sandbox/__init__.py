"""Runs model-written Python where it can do no harm, and repairs what is trivially wrong with it.

Processes: the trainer holds a `Sandbox` (pool.py, client.py), which starts one fork-server with warm imports
(zygote_handle.py outside, zygote.py inside); each session is a forked, jailed child (child_handle.py outside, child.py
and interpreter.py inside). Never imports torch.
"""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.sandbox.config import SandboxConfig as SandboxConfig
    from thyme.sandbox.pool import Sandbox as Sandbox
    from thyme.sandbox.pool import SandboxSession as SandboxSession
    from thyme.sandbox.result import Fix as Fix
    from thyme.sandbox.result import Layer as Layer
    from thyme.sandbox.result import SandboxResult as SandboxResult
    from thyme.sandbox.result import SandboxUnavailable as SandboxUnavailable
    from thyme.sandbox.result import SnippetError as SnippetError
    from thyme.sandbox.result import Status as Status
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "config": ["SandboxConfig"],
            "pool": ["Sandbox", "SandboxSession"],
            "result": ["Fix", "Layer", "SandboxResult", "SandboxUnavailable", "SnippetError", "Status"],
        },
    )
