"""What the verbs' configs have in common. Standard library only: a verb's help loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import INTERNAL
from thyme.data.config import DataConfig
from thyme.engine.config import EngineConfig
from thyme.evals.config import EvalConfig
from thyme.model.config import LoraConfig
from thyme.rewards.config import JudgeConfig, RewardConfig
from thyme.rollout.config import RolloutConfig
from thyme.sandbox.config import SandboxConfig
from thyme.toy.config import ToyConfig
from thyme.train.config import DistributedConfig, TrackConfig

EMBEDDED = "tiny"
"""The name of the model that is no folder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: its name, its model, its seed."""

    name: str = "run"
    """Results go to `runs/<name>/`."""
    model: str = EMBEDDED
    """A Hugging Face folder, a checkpoint of ours, or "tiny": the embedded 1.7 M parameter toy, random weights."""
    seed: int = 0
    """Seeds weights, data order and sampling."""
    max_pixels: int | None = None
    """Pictures are reduced to at most this area in this run; none: as the checkpoint says. A checkpoint that the run
    writes keeps its own figure."""
    threads: int = 2
    """Threads of torch on a CPU."""
    origins: Mapping[str, str] = field(default_factory=dict, metadata=INTERNAL, compare=False)
    """By dotted key, where a value was said: in a recipe or on the command line."""
    resumes: Path | None = field(default=None, metadata=INTERNAL, compare=False)
    """The folder of the run that goes on; None starts a new one."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name: {self.name!r} must be one folder name: results go to runs/<name>/")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels: {self.max_pixels} must be at least 1, or absent")
        if self.threads < 1:
            raise ValueError(f"threads: {self.threads} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ToyRunConfig(RunConfig):
    """A run on the toy world's data."""

    toy: ToyConfig = field(default_factory=ToyConfig)


@dataclass(frozen=True, kw_only=True)
class RowsConfig(ToyRunConfig):
    """A run on rows: files, or the toy world's where the model is the embedded one."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class LoopConfig(RunConfig):
    """A run with rollouts: engine, sandbox, and the loop between them."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rollout, sandbox = self.rollout, self.sandbox
        if rollout.max_in_flight is not None and rollout.max_in_flight > sandbox.max_sessions:
            raise ValueError(
                f"rollout.max_in_flight: {rollout.max_in_flight} cannot be reached with sandbox.max_sessions = "
                f"{sandbox.max_sessions}, as each rollout has a session: lower it or raise sandbox.max_sessions"
            )
        if rollout.max_rounds > sandbox.session_timeouts:
            raise ValueError(
                f"rollout.max_rounds: {rollout.max_rounds} snippets may use more CPU time than "
                f"sandbox.session_timeouts = {sandbox.session_timeouts} of them: lower it or raise "
                "sandbox.session_timeouts"
            )


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(LoopConfig, RowsConfig):
    """Rollouts of rows, and what they earn."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluatedConfig(ScoredConfig):
    """Rollouts that a model is measured by."""

    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(EvaluatedConfig):
    """A training run: what it reads, and what it is measured and watched by on its way."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
