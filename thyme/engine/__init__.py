"""The rollout engine: paged KV cache, continuous batching, the tag automaton. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thyme.engine.config import EngineConfig
    from thyme.engine.engine import Delta, Engine
    from thyme.engine.params import Prompt, SamplingParams
    from thyme.engine.sequence import Completion, FinishReason, Sequence, SequenceStatus
    from thyme.engine.tags import TagAutomaton, TokenKind

_HOME = {
    "Completion": "sequence",
    "Delta": "engine",
    "Engine": "engine",
    "EngineConfig": "config",
    "FinishReason": "sequence",
    "Prompt": "params",
    "SamplingParams": "params",
    "Sequence": "sequence",
    "SequenceStatus": "sequence",
    "TagAutomaton": "tags",
    "TokenKind": "tags",
}

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "Prompt",
    "SamplingParams",
    "Sequence",
    "SequenceStatus",
    "TagAutomaton",
    "TokenKind",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"thyme.engine.{_HOME[name]}"), name)
