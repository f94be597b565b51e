"""The reward of a rollout, with its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from thyme.rewards.consistency import consistency
from thyme.rewards.judge import Judge
from thyme.rewards.rules import combine, formatting, guarded, judged
from thyme.rollout.types import Rollout, RolloutStatus

_log = logging.getLogger(__name__)


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


NOTHING = Reward(total=0.0, result=0.0, consistency=0.0, formatting=0.0)


def score(rollout: Rollout, judge: Judge) -> Reward:
    """The reward of one rollout. A rollout that wrote a sandbox tag itself earns nothing for its format.

    A part that raises, whether by its rules or by the judge, is 0 and named in `error`: one rollout must not cost
    the step that all the others were sampled for.
    """
    question = rollout.question
    right, wrong_result = judged(rollout.answer, question.solution, question.question, judge)
    agrees, neat = 0.0, 0.0
    wrong_consistency = wrong_format = None
    if right:
        agrees, wrong_consistency = guarded("consistency", lambda: consistency(rollout.text, judge), 0.0)
    if rollout.status is not RolloutStatus.FORGED:
        neat, wrong_format = guarded("formatting", lambda: formatting(rollout.text), 0.0)
    errors = [error for error in (wrong_result, wrong_consistency, wrong_format) if error is not None]
    return Reward(
        total=combine(right, agrees, neat),
        result=right,
        consistency=agrees,
        formatting=neat,
        error="; ".join(errors) or None,
    )


def scored(rollout: Rollout, score: Callable[[Rollout], Reward]) -> Reward:
    """What a reward function gives; 0, with what it raised in `error` and in the log, if it raises."""
    reward, error = guarded("score", lambda: score(rollout), NOTHING)
    if error is not None:
        reward = replace(reward, error=error)
    if reward.error is not None:
        _log.warning("question %r, rollout %d: %s", rollout.question.id, rollout.index, reward.error)
    return reward
