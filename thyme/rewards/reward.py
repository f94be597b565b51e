"""The reward of a rollout, with its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thyme.rewards.consistency import consistency
from thyme.rewards.judge import Judge
from thyme.rewards.rules import combine, formatting, result
from thyme.rollout.types import Rollout, RolloutStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Parts are 0 or 1; the total is one of 0, 0.5, 1, 1.5, 2."""

    total: float
    result: float
    consistency: float
    """0 where the result is 0: it is gated, so it is not asked for."""
    formatting: float
    error: str | None = None
    """What the parts raised, if one did: "result: ValueError: ..."; a part that raised is 0."""


def score(rollout: Rollout, judge: Judge) -> Reward:
    """The reward of one rollout. A rollout that wrote a sandbox tag itself earns nothing for its format.

    A part that raises, whether by its rules or by the judge, is 0 and named in `error`: one rollout must not cost
    the step that all the others were sampled for.
    """
    errors: list[str] = []

    def part(name: str, compute: Callable[[], float]) -> float:
        try:
            return compute()
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
            return 0.0

    question = rollout.question
    right = part("result", lambda: result(rollout.answer, question.solution, question.question, judge))
    agrees = part("consistency", lambda: consistency(rollout.text, judge)) if right else 0.0
    forged = rollout.status is RolloutStatus.FORGED
    neat = 0.0 if forged else part("formatting", lambda: formatting(rollout.text))
    return Reward(
        total=combine(right, agrees, neat),
        result=right,
        consistency=agrees,
        formatting=neat,
        error="; ".join(errors) or None,
    )
