"""What is built of raw rows, by whom, and under which rules. Standard library only."""

import re
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Literal, get_args

from thyme.config import RARE

Scenario = Literal["no_code", "operations", "crop", "rotation", "contrast", "math", "zoom", "correction"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
CATEGORIES = ("OCR", "attribute", "position", "quantity", "object", "chart")
"""Of questions for RL, as the paper's annotators told them apart."""

MAX_CONCURRENCY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """A model that sees, behind an OpenAI-compatible server."""

    url: str | None = None
    """Base of its API, such as "http://localhost:8000/v1"; none: of the writer, this project's own engine writes."""
    model: str | None = None
    """Its name there."""
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=RARE)
    """The environment variable that holds the key; a server of one's own needs none."""
    concurrency: int = 32
    """Requests that are open at once."""
    timeout_s: float = field(default=300.0, metadata=RARE)
    """Seconds that a request may take before it counts as failed."""
    retries: int = field(default=3, metadata=RARE)
    """Further tries after a time-out, a lost connection or an overload (408, 409, 429, 5xx)."""
    max_tokens: int = 2048
    """Tokens of one answer."""
    temperature: float = 0.7
    """Of its sampling."""

    def __post_init__(self) -> None:
        if self.url is not None:
            _require(self, "url", self.url.startswith(("http://", "https://")), "an http:// or https:// address")
            _require(self, "model", bool(self.model), "the model's name at url")
        _require(self, "model", self.url is not None or self.model is None, "absent where url is")
        _require(self, "api_key_env", bool(self.api_key_env), "the name of an environment variable")
        _require(self, "concurrency", 1 <= self.concurrency <= MAX_CONCURRENCY, f"from 1 to {MAX_CONCURRENCY}")
        _require(self, "timeout_s", isfinite(self.timeout_s) and self.timeout_s > 0, "finite and above 0")
        _require(self, "retries", self.retries >= 0, "at least 0")
        _require(self, "max_tokens", self.max_tokens >= 1, "at least 1")
        _require(self, "temperature", isfinite(self.temperature) and self.temperature >= 0, "finite and at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesConfig:
    """How rows are shared out among the scenarios that they are fit for: the paper's counts, in thousands."""

    no_code: float = 100.0
    """Answered without code."""
    operations: float = 50.0
    """The picture operation that the writer finds useful: direction, light, scale, or several."""
    crop: float = 28.0
    """A crop of the target's box."""
    rotation: float = 14.0
    """A picture turned by 30 to 335 degrees, which the code turns back."""
    contrast: float = 10.0
    """A picture of low contrast, which the code stretches."""
    math: float = 15.0
    """A calculation in code; of rows without a picture, or of category "math"."""
    zoom: float = 70.0
    """Two rounds: a box around the target's box, then that one."""
    correction: float = 70.0
    """Two rounds: a box that misses the target, then the target's."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _require(self, f.name, 0 <= getattr(self, f.name) < float("inf"), "finite and at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """How rows are built."""

    rows: Literal["sft", "rl"] = "sft"
    """"sft": demonstrations by scenario. "rl": hard high-resolution questions; `data build --rl` says the same."""
    count: int = 0
    """Raw rows that are sampled; 0: all of them."""
    seed: int = 0
    """Draws the sample, each row's scenario, angle, contrast and boxes, and which rows are reviewed."""
    shares: SharesConfig = field(default_factory=SharesConfig)
    prompt: Literal["scenario", "question"] = "scenario"
    """What the writer is told: the scenario with its rules and facts, or the question alone, as a model that was
    trained on such rows is."""
    concurrency: int = 64
    """Rows that are under way at once."""
    triage: bool = True
    """Whether a writer behind an endpoint is first asked which operation a picture needs, of rows for `no_code` and
    `operations`; those that it finds to be of the other kind are dropped."""
    consistency: bool = True
    """Whether a judge must find thinking and answer in agreement, where there is one."""
    evidence: str = ""
    """The evidence check: "builtin", or "FILE.py:NAME" for a function of one's own; empty: none."""
    review: float = 0.0
    """Share of the rows that wait for a person's word before they count (runs/<name>/review/)."""
    samples: int = 8
    """For RL: answers that the model gives to each question; all right and all wrong are dropped."""
    min_side: int = field(default=2048, metadata=RARE)
    """For RL: the longer side of a picture is over so many pixels."""
    max_target: float = field(default=0.05, metadata=RARE)
    """For RL: the target takes at most this share of the picture."""
    ray_workers: int = 0
    """Workers on Ray, each with an engine or writer and a sandbox of its own; 0: this process alone."""
    ray_address: str = field(default="", metadata=RARE)
    """Of a Ray cluster, such as "auto"; empty: a cluster on this machine for the time of the run."""
    ray_batch: int = field(default=16, metadata=RARE)
    """Rows that a worker is handed at once."""

    def __post_init__(self) -> None:
        for name in ("count", "seed", "ray_workers"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("concurrency", "samples", "min_side", "ray_batch"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "review", 0 <= self.review <= 1, "a share from 0 to 1")
        _require(self, "max_target", 0 < self.max_target <= 1, "a share above 0, at most 1")
        is_named = self.evidence in ("", "builtin") or re.fullmatch(r".+\.py:\w+", self.evidence) is not None
        _require(self, "evidence", is_named, "empty, builtin, or FILE.py:NAME")


def _require(config: object, name: str, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {getattr(config, name)!r} must be {rule}")
