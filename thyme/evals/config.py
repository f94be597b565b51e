"""How a model is evaluated. Standard library only."""

from dataclasses import dataclass


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
    every_steps: int = 0
    """While training, held-out questions are asked after every so many steps; 0: not at all."""

    def __post_init__(self) -> None:
        for name in ("num_questions", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.every_steps < 0:
            raise ValueError(f"every_steps: {self.every_steps} must be at least 0")
        for name in ("temperature", "code_temperature"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be finite and at least 0")
