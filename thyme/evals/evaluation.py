"""Evaluation: held-out questions through the rollout loop, and the figures overall and by scenario."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thyme.evals.scoring import Summary, summarize
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
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


def evaluate(loop: RolloutLoop, questions: Sequence[Question], sampling: Sampling | None = None) -> EvalResult:
    """Accuracy with 95 % intervals, overall and by scenario.

    Args:
        loop: runs the rollouts.
        questions: at least one.
        sampling: how the answers are drawn; None: one rollout per question, greedy. With several per question,
            accuracy is their mean, which makes sense at a temperature above 0.

    Raises:
        ValueError: no questions.
    """
    if not questions:
        raise ValueError("evaluate: no questions")
    sampling = sampling or loop.config.sampling().greedy()
    started = time.perf_counter()
    groups = loop.run(questions, sampling)
    by_scenario: dict[str, list[list[Rollout]]] = {}
    for question, group in zip(questions, groups, strict=True):
        by_scenario.setdefault(question.scenario, []).append(group)
    return EvalResult(
        overall=summarize(groups),
        scenarios={name: summarize(part) for name, part in by_scenario.items()},
        temperature=sampling.temperature,
        code_temperature=sampling.code_temperature,
        wall_s=time.perf_counter() - started,
        rollouts=groups,
    )
