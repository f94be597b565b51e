"""Evaluation: held-out questions through the rollout loop, and the figures overall and by scenario."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thyme.evals.scoring import Summary, summarize
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Figures of one evaluation, and the rollouts behind them."""

    overall: Summary
    scenarios: dict[str, Summary]
    """By scenario, in order of first appearance; questions without one are under ""."""
    temperature: float
    """Of text."""
    code_temperature: float
    """Inside code."""
    wall_s: float
    """Seconds the rollouts took."""
    rollouts: list[list[Rollout]]
    """In question order."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the rollouts."""
        return {
            "overall": asdict(self.overall),
            "scenarios": {name: asdict(summary) for name, summary in self.scenarios.items()},
            "temperature": self.temperature,
            "code_temperature": self.code_temperature,
            "wall_s": self.wall_s,
        }


def evaluate(
    loop: RolloutLoop,
    questions: Sequence[Question],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    code_temperature: float = 0.0,
    seed: int = 0,
    allow_code: bool = True,
) -> EvalResult:
    """Accuracy with 95 % intervals, overall and by scenario. Greedy by default.

    Args:
        samples: rollouts per question; more than one makes sense at a temperature above 0.
        temperature, code_temperature: of text and of code.
        seed: of the sampler.
        allow_code: False forbids code (see `RolloutLoop.run`).

    Raises:
        ValueError: no questions.
    """
    if not questions:
        raise ValueError("evaluate: no questions")
    started = time.perf_counter()
    groups = loop.run(
        questions, samples, temperature=temperature, code_temperature=code_temperature, seed=seed, allow_code=allow_code
    )
    by_scenario: dict[str, list[list[Rollout]]] = {}
    for question, group in zip(questions, groups, strict=True):
        by_scenario.setdefault(question.scenario, []).append(group)
    return EvalResult(
        overall=summarize(groups),
        scenarios={name: summarize(part) for name, part in by_scenario.items()},
        temperature=temperature,
        code_temperature=code_temperature,
        wall_s=time.perf_counter() - started,
        rollouts=groups,
    )
