"""What reward and judge may be said to be, and what is refused in words."""

import subprocess
import sys
from typing import Any

import pytest

from thyme.rewards.config import JudgeConfig, RewardConfig

URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"function": "reward"}, "function: 'reward' must be FILE.py:NAME"),
        ({"function": "reward.py"}, "function: 'reward.py' must be FILE.py:NAME"),
        ({"function": "reward.py:"}, "FILE.py:NAME"),
        ({"function": "package.module:name"}, "FILE.py:NAME"),
        ({"function": "r.py:f", "tool_bonus": 0.1}, "tool_bonus: 0.1 must be 0 beside a function"),
        ({"function": "r.py:f", "overlong_buffer_tokens": 9}, "overlong_buffer_tokens: 9 must be 0 beside a function"),
        ({"function_timeout_s": 0.0}, "function_timeout_s: 0.0 must be finite and above 0"),
        ({"mode": "sum"}, "mode: 'sum' must be one of gated, additive, result"),
        ({"consistency": -0.1}, "consistency: -0.1 must be finite and at least 0"),
        ({"formatting": float("nan")}, "formatting: nan must be finite"),
        ({"tool_bonus": float("inf")}, "tool_bonus: inf must be finite"),
        ({"tool_bonus_runs": 0}, "tool_bonus_runs: 0 must be at least 1"),
        ({"overlong_buffer_tokens": -1}, "overlong_buffer_tokens: -1 must be at least 0"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RewardConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "localhost:8000", "model": "m"}, "url: 'localhost:8000' must be an http:// or https:// address"),
        ({"url": URL}, "model: None must be the judge's name at judge.url"),
        ({"model": "m"}, "model: 'm' must be absent where judge.url is"),
        ({"api_key_env": ""}, "api_key_env"),
        ({"concurrency": 0}, "concurrency: 0 must be from 1 to 1000"),
        ({"concurrency": 1001}, "concurrency: 1001 must be from 1 to 1000"),
        ({"max_tokens": 0}, "max_tokens: 0 must be at least 1"),
        ({"retries": -1}, "retries: -1 must be at least 0"),
        ({"timeout_s": 0.0}, "timeout_s: 0.0 must be finite and above 0"),
        ({"temperature": float("nan")}, "temperature: nan must be finite"),
        ({"cache": ""}, "cache: '' must be a folder, or absent"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        JudgeConfig(**values)
    assert message in str(error.value)


def test_the_defaults_are_the_papers_reward_without_a_judge() -> None:
    reward = RewardConfig()
    assert (reward.function, reward.mode, reward.consistency, reward.formatting) == (None, "gated", 0.5, 0.5)
    assert JudgeConfig().url is None
    assert RewardConfig(function="my/folder/reward.py:length").function == "my/folder/reward.py:length"
    assert JudgeConfig(url=URL, model="m").model == "m"


def test_the_configs_load_neither_torch_nor_a_client() -> None:
    code = "import sys, thyme.rewards.config; sys.exit(any(m in sys.modules for m in ('torch', 'openai', 'httpx')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
