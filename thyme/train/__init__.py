"""Training: base stage, SFT, math annealing and GRPO-ATS over one model shared with the engine."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "loss_spans": "masks",
    "group_advantages": "advantages",
    "Sample": "packing",
    "TrainBatch": "packing",
    "pack": "packing",
    "build_optimizer": "optim",
    "MetricsLog": "metrics",
    "train_sft": "sft",
    "train_rl": "rl",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
