"""Which reward a run has, and who judges what rules cannot. Standard library only."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

MAX_CONCURRENCY = 1000
"""Connections that the client opens at most."""
RewardMode = Literal["gated", "additive", "result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """What a rollout earns: a mode of the paper's three parts, or a function of one's own."""

    function: str | None = None
    """A function of one's own, "file.py:name", the file relative to the working directory: it takes a group of rollouts
    and gives as many rewards (`thyme.rewards.function`). None: the parts below, put together by `mode`."""
    function_timeout_s: float = 600.0
    """Seconds it may take for a group."""
    mode: RewardMode = "gated"
    """"gated": R (1 + consistency * C) + formatting * F, Thyme's. "additive": R + consistency * C + formatting * F, so
    that consistency pays for a wrong answer too. "result": R alone."""
    consistency: float = 0.5
    """Weight of C, the agreement of the reasoning with the answer (Thyme: 0.5)."""
    formatting: float = 0.5
    """Weight of F, the format (Thyme: 0.5)."""
    tool_bonus: float = 0.0
    """Earned on top for each code block that ran without an error, where the answer is right; 0: off."""
    tool_bonus_runs: int = 4
    """No more code blocks than this earn `tool_bonus`."""
    evidence: float = 0.0
    """Earned on top where the answer is right and what its tools returned holds it, as far as rules and a text reader
    see (`thyme.rewards.evidence`, extra `evidence`); 0: off."""
    overlong_buffer_tokens: int = 0
    """Over so many tokens before the response's limit the reward falls linearly to `overlong_penalty` less (DAPO's soft
    punishment); 0: off."""
    overlong_penalty: float = 1.0
    """What a response that reaches its limit loses."""

    def __post_init__(self) -> None:
        file, colon, name = (self.function or "x.py:f").rpartition(":")
        _require(self, "function", bool(colon) and file.endswith(".py") and name.isidentifier(), "FILE.py:NAME")
        for field in ("tool_bonus", "evidence", "overlong_buffer_tokens"):
            alone = self.function is None or getattr(self, field) == 0
            _require(self, field, alone, "0 beside a function, which gives the whole reward")
        _require(self, "mode", self.mode in get_args(RewardMode), f"one of {', '.join(get_args(RewardMode))}")
        patience = self.function_timeout_s
        _require(self, "function_timeout_s", isfinite(patience) and patience > 0, "finite and above 0")
        for field in ("consistency", "formatting", "tool_bonus", "evidence", "overlong_penalty"):
            value = getattr(self, field)
            _require(self, field, isfinite(value) and value >= 0, "finite and at least 0")
        _require(self, "tool_bonus_runs", self.tool_bonus_runs >= 1, "at least 1 (tool_bonus 0 turns the bonus off)")
        _require(self, "overlong_buffer_tokens", self.overlong_buffer_tokens >= 0, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A judge: a language model behind an OpenAI-compatible server, asked what the rules cannot decide."""

    url: str | None = None
    """Base of its API, such as "http://localhost:8000/v1". None: no judge, and the rules have the last word."""
    model: str | None = None
    """Its name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; a server of one's own needs none."""
    concurrency: int = 32
    """Requests that each process has open at once."""
    timeout_s: float = 60.0
    """Seconds a request may take before it counts as failed."""
    retries: int = 3
    """Further tries of a request after a time-out, a lost connection, an overload (408, 409, 429, 5xx) or an answer
    that is no verdict; waits between them grow, or are what the server asks for."""
    max_tokens: int = 256
    """Tokens its answer may have (Thyme: 256); a judge that thinks before it answers needs more."""
    temperature: float = 0.0
    """Of the judge (Thyme: 0.1)."""
    cache: str | None = None
    """A folder that keeps verdicts, so that nothing is asked twice, over runs and processes; None: none are kept."""

    def __post_init__(self) -> None:
        if self.url is not None:
            _require(self, "url", self.url.startswith(("http://", "https://")), "an http:// or https:// address")
            _require(self, "model", bool(self.model), "the judge's name at judge.url")
        _require(self, "model", self.url is not None or self.model is None, "absent where judge.url is")
        _require(self, "api_key_env", bool(self.api_key_env), "the name of an environment variable")
        _require(self, "concurrency", 1 <= self.concurrency <= MAX_CONCURRENCY, f"from 1 to {MAX_CONCURRENCY}")
        _require(self, "max_tokens", self.max_tokens >= 1, "at least 1")
        _require(self, "retries", self.retries >= 0, "at least 0")
        _require(self, "timeout_s", isfinite(self.timeout_s) and self.timeout_s > 0, "finite and above 0")
        _require(self, "temperature", isfinite(self.temperature) and self.temperature >= 0, "finite and at least 0")
        _require(self, "cache", self.cache != "", "a folder, or absent")


def _require(config: object, name: str, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {getattr(config, name)!r} must be {rule}")
