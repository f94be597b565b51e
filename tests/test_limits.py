"""Every number of the configs that bound something: a fraction, NaN, a text or a truth value is refused where it is
given, by name, and not by a step hours later."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from thyme.engine import EngineConfig
from thyme.rollout.config import RolloutConfig
from thyme.rollout.phases import PhaseConfig
from thyme.sandbox import SandboxConfig


def numbers(config: type, kind: str) -> list[str]:
    """The fields that are declared so."""
    names = [
        (f.name, f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)))
        for f in fields(config)
    ]
    return [name for name, declared in names if declared in (kind, f"{kind} | None")]


CASES = [
    (config, name, value)
    for config in (EngineConfig, RolloutConfig, SandboxConfig, PhaseConfig)
    for kind, values in (("int", (1.5, math.nan, math.inf, "16", True, [1])), ("float", (math.nan, "1", False, [1.0])))
    for name in numbers(config, kind)
    for value in values
]


@pytest.mark.parametrize("config", [EngineConfig, RolloutConfig, SandboxConfig, PhaseConfig])
def test_what_is_no_number_is_refused_by_name(config: type) -> None:
    cases = [(name, value) for owner, name, value in CASES if owner is config]
    assert len(cases) > 10
    for name, value in cases:
        with pytest.raises(ValueError) as error:
            config(**{name: value})
        assert name in str(error.value) and "number" in str(error.value), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"temperatures": {"number": "1"}}, "temperatures.number"),
        ({"temperatures": {"number": math.nan}}, "temperatures.number"),
    ],
)
def test_how_tokens_are_drawn_is_checked_before_a_model_is_loaded(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RolloutConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_stdout_bytes": 1 << 80}, ("max_stdout_bytes", "memory_mib")),
        ({"max_code_bytes": (256 << 20) + 1}, ("max_code_bytes", "memory_mib=256")),
        ({"max_files": (1 << 20) + 1}, ("max_files", "1048576")),
        ({"preload": (1,)}, ("preload", "1")),
    ],
)
def test_limits_that_no_machine_could_reach_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    fitting: dict[str, Any] = {"workers": 1, "memory_mib": 256}
    with pytest.raises(ValueError) as error:
        SandboxConfig(**fitting | changes)
    assert all(word in str(error.value) for word in words)
    SandboxConfig(**fitting, max_code_bytes=256 << 20, max_files=1 << 20)


def test_numbers_of_numpy_are_numbers() -> None:
    sizes: dict[str, Any] = {"num_blocks": np.int64(16), "memory_fraction": np.float32(0.5)}
    config = EngineConfig(**sizes)
    assert (config.num_blocks, config.memory_fraction) == (16, 0.5)
    with pytest.raises(ValueError, match="num_blocks must be a whole number"):
        EngineConfig(num_blocks=np.float64(16))  # type: ignore[arg-type]
