"""The reward of a rollout, with its parts."""

from __future__ import annotations

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


def score(rollout: Rollout, judge: Judge) -> Reward:
    """The reward of one rollout. A rollout that wrote a sandbox tag itself earns nothing for its format."""
    right = result(rollout.answer, rollout.question.solution, rollout.question.question, judge)
    agrees = consistency(rollout.text, judge) if right else 0.0
    neat = 0.0 if rollout.status is RolloutStatus.FORGED else formatting(rollout.text)
    return Reward(total=combine(right, agrees, neat), result=right, consistency=agrees, formatting=neat)
