"""Controls: what accuracy would be without the thing that is claimed to cause it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from thyme.evals.evaluation import evaluate
from thyme.evals.scoring import Summary, chance
from thyme.rewards import Scorer
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question

NO_CODE_NEEDED = ("direct",)
"""Scenarios that can be answered from the picture as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCodeControl:
    """Accuracy on questions that need code, with code forbidden, beside what guessing is worth."""

    overall: Summary
    scenarios: dict[str, Summary]
    chance: dict[str, float]
    """By scenario: how often another question's solution, drawn at random, is right."""

    def to_json(self) -> dict[str, Any]:
        """By scenario: the summary, chance beside it."""
        scenarios = {name: asdict(s) | {"chance": self.chance[name]} for name, s in self.scenarios.items()}
        return {"overall": asdict(self.overall), "scenarios": scenarios}


def no_code_control(
    loop: RolloutLoop,
    questions: Sequence[Question],
    sampling: Sampling | None = None,
    *,
    scorer: Scorer | None = None,
) -> NoCodeControl:
    """Accuracy on the scenarios that need code, with code forbidden; drawn and judged as in `evaluate`.

    It means something for a model that learned to answer such questions directly with the true answer: then what it
    reaches is what can be read from the picture as it is, and the rest is owed to the code.

    Raises:
        ValueError: no question of a scenario that needs code.
    """
    needed = [question for question in questions if question.scenario not in NO_CODE_NEEDED]
    if not needed:
        raise ValueError(f"no_code_control: all questions are of {', '.join(NO_CODE_NEEDED)}, which needs no code")
    sampling = sampling or loop.config.sampling().greedy()
    result = evaluate(loop, needed, replace(sampling, allow_code=False), scorer=scorer)
    return NoCodeControl(
        overall=result.overall,
        scenarios=result.scenarios,
        chance={name: chance([q for q in needed if q.scenario == name]) for name in result.scenarios},
    )
