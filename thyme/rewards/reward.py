"""The reward of a rollout, with its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from thyme.rewards.config import RewardConfig
from thyme.rewards.consistency import consistency
from thyme.rewards.evidence import Verdict, rollout_evidence
from thyme.rewards.judge import Judge
from thyme.rewards.rules import combine, formatting, guarded, judged
from thyme.rewards.shaping import overlong, tool_bonus
from thyme.rollout.types import Rollout, RolloutStatus

_log = logging.getLogger(__name__)

PAPER = RewardConfig()
"""Thyme's reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a rollout earned in all, and the parts it is made of. Of the paper's reward, parts are 0 or 1 and the total
    is one of 0, 0.5, 1, 1.5, 2."""

    total: float
    """What is learned from."""
    result: float = 0.0
    """Whether the answer is right."""
    consistency: float = 0.0
    """0 where it is not asked for: where it could not pay, as for a wrong answer under the mode "gated"."""
    formatting: float = 0.0
    """Whether the text has the right form."""
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Further parts by name: "tool_bonus", "evidence", "overlong" where they are on, and those of a function of one's
    own."""
    error: str | None = None
    """What the parts raised, if one did: "result: ValueError: ..."; a part that raised is 0."""


NOTHING = Reward(total=0.0)


def score(rollout: Rollout, judge: Judge, config: RewardConfig = PAPER, *, max_tokens: int | None = None) -> Reward:
    """The reward of one rollout. A rollout that wrote a sandbox tag itself earns nothing for its format.

    A part that raises, whether by its rules or by the judge, is 0 and named in `error`: one rollout must not cost
    the step that all the others were sampled for.

    Args:
        rollout: a finished one.
        judge: asked about answers that the rules do not accept, and about consistency where that can pay.
        config: how the parts are put together; its `function` is not looked at.
        max_tokens: see `put_together`.
    """
    question = rollout.question
    right, wrong_result = judged(rollout.answer, question.solution, question.question, judge)
    agrees, wrong_consistency = 0.0, None
    if consistency_pays(config, right):
        agrees, wrong_consistency = guarded("consistency", lambda: consistency(rollout.text, judge), 0.0)
    held, no_evidence = held_by_tools(rollout, config, right)
    errors = (wrong_result, wrong_consistency, no_evidence)
    return put_together(rollout, config, right, agrees, errors, evidence=held, max_tokens=max_tokens)


def held_by_tools(rollout: Rollout, config: RewardConfig, result: float) -> tuple[float, str | None]:
    """1 if the evidence of a right answer is held, where that pays, and what finding out raised; reading text off
    pictures takes its time, so not on an event loop."""
    if not config.evidence or not result:
        return 0.0, None
    return guarded("evidence", lambda: float(rollout_evidence(rollout).verdict is Verdict.HELD), 0.0)


def consistency_pays(config: RewardConfig, result: float) -> bool:
    """Whether the reward depends on consistency, so that a judge is to be asked."""
    if config.mode == "result" or config.consistency == 0:
        return False
    return config.mode == "additive" or result > 0


def put_together(
    rollout: Rollout,
    config: RewardConfig,
    result: float,
    consistency: float,
    errors: tuple[str | None, ...] = (),
    *,
    evidence: float = 0.0,
    max_tokens: int | None = None,
) -> Reward:
    """The reward of a rollout whose result and consistency are known.

    Args:
        rollout: a finished one.
        config: mode, weights and what shapes the reward.
        result: 0 or 1.
        consistency: 0 or 1.
        errors: what finding out about them raised.
        evidence: 0 or 1, see `held_by_tools`.
        max_tokens: tokens a response may have in all; needed where `config.overlong_buffer_tokens` is on.

    Raises:
        ValueError: the buffer is on and max_tokens absent, or less than it.
    """
    neat, wrong_format = 0.0, None
    if rollout.status is not RolloutStatus.FORGED:
        neat, wrong_format = guarded("formatting", lambda: formatting(rollout.text), 0.0)
    parts = {}
    if config.tool_bonus:
        parts["tool_bonus"] = tool_bonus(rollout, config.tool_bonus, config.tool_bonus_runs) if result else 0.0
    if config.evidence:
        parts["evidence"] = config.evidence * evidence
    if config.overlong_buffer_tokens:
        buffer, penalty = config.overlong_buffer_tokens, config.overlong_penalty
        parts["overlong"] = overlong(rollout.num_sampled, response_limit(config, max_tokens), buffer, penalty)
    total = combine(
        result,
        consistency,
        neat,
        mode=config.mode,
        consistency_weight=config.consistency,
        formatting_weight=config.formatting,
    )
    return Reward(
        total=total + sum(parts.values()),
        result=result,
        consistency=consistency,
        formatting=neat,
        parts=parts,
        error="; ".join(error for error in (*errors, wrong_format) if error is not None) or None,
    )


def response_limit(config: RewardConfig, max_tokens: int | None) -> int:
    """`max_tokens`, checked against the buffer that lies before it; 0 where there is no buffer.

    Raises:
        ValueError: the buffer is on and max_tokens absent, or less than it.
    """
    buffer = config.overlong_buffer_tokens
    if buffer and max_tokens is None:
        raise ValueError(f"overlong_buffer_tokens: {buffer}, but the response has no limit (max_tokens)")
    if buffer and max_tokens is not None and buffer > max_tokens:
        raise ValueError(f"overlong_buffer_tokens: {buffer} must be at most the response's limit, {max_tokens} tokens")
    return max_tokens or 0


def scored(rollout: Rollout, score: Callable[[Rollout], Reward]) -> Reward:
    """What a reward function gives; 0, with what it raised in `error` and in the log, if it raises."""
    reward, error = guarded("score", lambda: score(rollout), NOTHING)
    return logged(rollout, reward if error is None else replace(reward, error=error))


def logged(rollout: Rollout, reward: Reward) -> Reward:
    """The reward; its error, if it has one, goes to the log."""
    if reward.error is not None:
        _log.warning("question %r, rollout %d: %s", rollout.question.id, rollout.index, reward.error)
    return reward
