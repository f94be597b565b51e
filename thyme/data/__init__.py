"""Data: the synthetic scenarios with their tiny model, the released row formats, and the check of both."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Caption": "synthetic",
    "SftRow": "synthetic",
    "captions": "synthetic",
    "questions": "synthetic",
    "sft_rows": "synthetic",
    "SCENARIOS": "config",
    "DataConfig": "config",
    "check_file": "check",
    "tiny_config": "tiny",
    "tiny_processor": "tiny",
    "toy_tokenizer": "tokenizer",
    "write_synthetic": "formats",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
