"""Evaluation: held-out questions through the rollout loop, and the figures overall and by scenario."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from thyme.evals.branching import best_of, retried
from thyme.evals.scoring import Summary, Verdict, by_rules, by_scorer, summarize
from thyme.rewards import Scorer
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
    verdicts: list[list[Verdict]]
    """On each of them."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the rollouts and what is held of each."""
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
    sampling: Sampling | None = None,
    *,
    scorer: Scorer | None = None,
    best: int = 1,
    retries: int = 0,
    on_end: Callable[[Rollout], object] | None = None,
) -> EvalResult:
    """Accuracy with 95 % intervals, overall and by scenario.

    Args:
        loop: runs the rollouts.
        questions: at least one.
        sampling: how the answers are drawn; None: one rollout per question, greedy. With several per question,
            accuracy is their mean, which makes sense at a temperature above 0.
        scorer: says by its rewards' results which answers are right, so that a judge can be asked about those that
            rules do not decide (`thyme.evals.scoring.by_scorer`); None: the rules say.
        best: rollouts that vote on each answer, all but one of them branches (`thyme.evals.branching`).
        retries: how often a round whose code failed is drawn again; before the vote.
        on_end: is told of each answer as it ends.

    Raises:
        ValueError: no questions; the scorer cannot work as things are.
    """
    if not questions:
        raise ValueError("evaluate: no questions")
    sampling = sampling or loop.config.sampling().greedy()
    started = time.perf_counter()
    drawn = loop.config.sampling(n=1, seed=sampling.seed)  # of what is tried again: as rollouts are drawn in training
    with loop.keeping() if best > 1 or retries else nullcontext():
        groups = loop.run(questions, sampling, on_end=on_end)
        groups = retried(loop, groups, retries, drawn) if retries else groups
        groups = best_of(loop, groups, best, drawn) if best > 1 else groups
    wall_s = time.perf_counter() - started
    verdicts = [[by_rules(one) for one in group] for group in groups] if scorer is None else by_scorer(scorer, groups)
    by_scenario: dict[str, tuple[list[list[Rollout]], list[list[Verdict]]]] = {}
    for question, group, said in zip(questions, groups, verdicts, strict=True):
        part = by_scenario.setdefault(question.scenario, ([], []))
        part[0].append(group)
        part[1].append(said)
    return EvalResult(
        overall=summarize(groups, verdicts),
        scenarios={name: summarize(*part) for name, part in by_scenario.items()},
        temperature=sampling.temperature,
        code_temperature=sampling.code_temperature,
        wall_s=wall_s,
        rollouts=groups,
        verdicts=verdicts,
    )
