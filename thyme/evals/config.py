"""How a model is evaluated. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

from thyme.config import RARE


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out questions and how their answers are drawn."""

    num_questions: int = 200
    """Held-out questions; 200 give a 95 % interval of about +-7 points at one half."""
    samples: int = 1
    """Rollouts per question; accuracy is their mean."""
    temperature: float = 0.0
    """Temperature of text; 0 is greedy."""
    code_temperature: float = 0.0
    """Temperature inside code; 0 is greedy."""
    seed: int = 0
    """Seed of the sampler."""
    best_of: int = field(default=1, metadata=RARE)
    """Rollouts that vote on each answer to a held-out question: one, and branches off it at the round whose start is
    least sure, drawn at the temperatures of `rollout`."""
    retries: int = field(default=0, metadata=RARE)
    """Times that a round whose code failed is drawn again, from its start, at the temperatures of `rollout`."""
    every_steps: int = 0
    """While training, held-out questions are asked after every so many steps; 0: not at all."""
    paper_protocol: bool = False
    """`thyme eval`: ask as the paper's evaluation does: what gives no answer, or calls a tool in vain, is drawn again,
    and at last answered without tools. Figures say how often; they are not to be compared with those without it."""
    paper_retries: int = field(default=4, metadata=RARE)
    """Times that `paper_protocol` draws again, at temperature 1; the released code's retries draw what failed, which 0
    amounts to."""
    benchmark: str = ""
    """`thyme eval`: published benchmarks by name, separated by commas, in place of held-out questions; "mcq", "yes_no"
    and "vqa" stand for any file in VLMEvalKit's layout."""
    data: str = ""
    """The file of the benchmark (TSV, CSV, parquet, JSON), or the folder that holds those of several."""
    limit: int = field(default=0, metadata=RARE)
    """Rows asked of each benchmark, the first ones; 0: all."""
    at_once: int = field(default=64, metadata=RARE)
    """Questions whose pictures are in memory at one time; the engine's batch is drawn from them."""
    evidence: bool = True
    """Whether what tools returned holds what the answer says is looked at, after each answer; text on pictures is read
    where the extra `evidence` is installed."""
    picture_gib: float = field(default=2.0, metadata=RARE)
    """GiB of disk that the questions' pictures may take in images/, of each benchmark under each control or
    disturbance, so that `thyme view` shows them; what comes when they are used up stays in the benchmark's file alone.
    As PNG, each once. Held-out questions without controls keep all."""
    robustness: str = ""
    """`thyme eval`: the same questions again with disturbed pictures, by commas, or all: rotated, flipped, darkened,
    blurred, noised, jpeg; with tools and without."""
    resume: bool = field(default=False, metadata=RARE)
    """Go on with the run of that name: what it has answered is not asked again. Held-out questions alone go on without
    it; with it, only from answers of this very model and these settings."""
    base: str = field(default="", metadata=RARE)
    """The model of the control "base": a folder, such as that of Qwen2.5-VL."""
    against: str = field(default="", metadata=RARE)
    """Another run's folder: the difference to it, question by question."""

    ray_workers: int = 0
    """`thyme eval`: workers on Ray, each with an engine and a sandbox of its own; 0: this process alone."""
    ray_address: str = field(default="", metadata=RARE)
    """Of a Ray cluster, such as "auto"; empty: a cluster on this machine for the time of the run."""

    def __post_init__(self) -> None:
        if self.data and not self.benchmark:
            raise ValueError("data: a file of which benchmark? eval.benchmark names it")
        if self.benchmark and not self.data:
            raise ValueError(f"benchmark: {self.benchmark}: eval.data must say where its file is")
        if self.limit < 0:
            raise ValueError(f"limit: {self.limit} must be at least 0")
        if self.retries < 0:
            raise ValueError(f"retries: {self.retries} must be at least 0")
        if (self.benchmark or self.paper_protocol or self.ray_workers) and (self.best_of > 1 or self.retries):
            raise ValueError(
                "best_of and retries are of held-out questions alone: leave them out with eval.benchmark, "
                "eval.paper_protocol and eval.ray_workers"
            )
        if not 0.0 <= self.picture_gib < float("inf"):
            raise ValueError(f"picture_gib: {self.picture_gib} must be finite and at least 0")
        if self.paper_retries < 0:
            raise ValueError(f"paper_retries: {self.paper_retries} must be at least 0")
        if self.paper_protocol and self.samples > 1:
            raise ValueError(f"paper_protocol: one answer a question, but samples is {self.samples}: leave one out")
        if self.paper_protocol and self.every_steps:
            raise ValueError("paper_protocol: questions are asked once while training: leave it out with every_steps")
        for name in ("num_questions", "samples", "at_once", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.ray_workers < 0:
            raise ValueError(f"ray_workers: {self.ray_workers} must be at least 0")
        if self.ray_workers and self.every_steps:
            raise ValueError("ray_workers: while training the trainer's own engine asks: leave it out with every_steps")
        if self.every_steps < 0:
            raise ValueError(f"every_steps: {self.every_steps} must be at least 0")
        for name in ("temperature", "code_temperature"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be finite and at least 0")

    def drawn(self) -> dict[str, Any]:
        """How answers are drawn, as `RolloutConfig.sampling` takes it."""
        return {
            "n": self.samples,
            "temperature": self.temperature,
            "code_temperature": self.code_temperature,
            "phases": {},
            "seed": self.seed,
        }
