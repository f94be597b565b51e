"""What the verbs' configs have in common. Standard library only: a verb's help loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thyme.config import INTERNAL
from thyme.engine.config import EngineConfig
from thyme.rollout.config import RolloutConfig
from thyme.sandbox.config import SandboxConfig
from thyme.toy.config import ToyConfig

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
    threads: int = 2
    """Threads of torch on a CPU."""
    origins: Mapping[str, str] = field(default_factory=dict, metadata=INTERNAL, compare=False)
    """By dotted key, where a value was said: in a recipe or on the command line."""
    resumes: Path | None = field(default=None, metadata=INTERNAL, compare=False)
    """The folder of the run that goes on; None starts a new one."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name: {self.name!r} must be one folder name: results go to runs/<name>/")
        if self.threads < 1:
            raise ValueError(f"threads: {self.threads} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ToyRunConfig(RunConfig):
    """A run on the toy world's data."""

    toy: ToyConfig = field(default_factory=ToyConfig)


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
