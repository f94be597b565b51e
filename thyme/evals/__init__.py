"""Evaluation: accuracy with intervals, overall and by scenario, and the controls beside it."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "EvalConfig": "config",
    "EvalResult": "evaluation",
    "evaluate": "evaluation",
    "NoCodeControl": "controls",
    "no_code_control": "controls",
    "Summary": "scoring",
    "chance": "scoring",
    "is_correct": "scoring",
    "summarize": "scoring",
    "wilson": "scoring",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
