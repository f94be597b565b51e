"""The multi-round rollout: prompts, the loop over engine and sandbox, and what is written to disk."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "SYSTEM_PROMPT": "prompts",
    "build_prompt": "prompts",
    "extract_answer": "prompts",
    "extract_code": "prompts",
    "text_prompt": "prompts",
    "user_prompt": "prompts",
    "Question": "types",
    "Rollout": "types",
    "RolloutStatus": "types",
    "Turn": "types",
    "RolloutConfig": "config",
    "RolloutLoop": "rollout",
    "Sampling": "sampling",
    "read_rollouts": "records",
    "write_rollouts": "records",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
