"""Scores groups by rules and, where they do not decide, by a judge behind a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

from thyme.rewards.config import RewardConfig
from thyme.rewards.consistency import conclusion
from thyme.rewards.judge import AsyncJudge, JudgeUnavailable
from thyme.rewards.judge_http import HttpJudge
from thyme.rewards.reward import Reward, consistency_pays, held_by_tools, logged, put_together
from thyme.rewards.rules import guarded, verdict
from thyme.rewards.scorer import ScorerError
from thyme.rewards.threads import LoopThread, WorkThread
from thyme.rollout.types import Rollout


class JudgeScorer:
    """Rules first, on a thread of their own; then the judge, for all groups at once.

    Args:
        judge: asked about answers that the rules do not accept, never about a refusal, and about consistency where it
            can pay.
        config: how the parts are put together.
        loop: what the judge is awaited on.
        max_tokens: see `thyme.rewards.reward.put_together`.
    """

    def __init__(self, judge: HttpJudge, config: RewardConfig, *, loop: LoopThread, max_tokens: int | None) -> None:
        self._judge, self._config, self._loop, self._max_tokens = judge, config, loop, max_tokens
        self._rules = WorkThread("reward rules")
        self._broken: str | None = None

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        if self._broken is not None:
            raise ScorerError(self._broken)
        return self._loop.submit(self._score(list(group)))

    def metrics(self) -> dict[str, float]:
        return self._judge.metrics()

    def close(self) -> None:
        """Ends the thread of the rules."""
        self._rules.close()

    async def _score(self, group: list[Rollout]) -> list[Reward]:
        """The group's rewards, once all of its rollouts are through: a failure leaves no request without an owner."""
        given = await asyncio.gather(*(self._score_one(rollout) for rollout in group), return_exceptions=True)
        rewards = []
        for rollout, outcome in zip(group, given, strict=True):
            if isinstance(outcome, ScorerError):
                self._broken = str(outcome)
            if isinstance(outcome, JudgeUnavailable):
                where = f"question {rollout.question.id!r}, rollout {rollout.index}"
                raise JudgeUnavailable(f"{where}: {outcome}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            rewards.append(logged(rollout, outcome))
        return rewards

    async def _score_one(self, rollout: Rollout) -> Reward:
        decided, error = await asyncio.wrap_future(self._rules.submit(lambda: _by_rules(rollout)))
        return await score_by(self._judge, rollout, decided, error, self._config, max_tokens=self._max_tokens)


async def score_by(
    judge: AsyncJudge,
    rollout: Rollout,
    decided: bool | None,
    error: str | None,
    config: RewardConfig,
    *,
    max_tokens: int | None = None,
) -> Reward:
    """`thyme.rewards.reward.score` with a judge that is awaited.

    Args:
        judge: see `JudgeScorer`.
        rollout: a finished one.
        decided: what the rules say of the answer, None where a judge must.
        error: what they raised.
        config: how the parts are put together.
        max_tokens: see `thyme.rewards.reward.put_together`.

    Raises:
        JudgeUnavailable: no verdict on a part that the reward depends on.
    """
    question = rollout.question
    right = decided
    if right is None:
        right = await judge.correct(question.question, rollout.answer or "", question.solution)
    agrees = False
    if consistency_pays(config, right) and (asked := conclusion(rollout.text)) is not None:
        agrees = await judge.consistent(*asked)
    held, no_evidence = 0.0, None
    if config.evidence and right:
        held, no_evidence = await asyncio.to_thread(held_by_tools, rollout, config, float(right))
    errors = (error, no_evidence)
    return put_together(rollout, config, float(right), float(agrees), errors, evidence=held, max_tokens=max_tokens)


def _by_rules(rollout: Rollout) -> tuple[bool | None, str | None]:
    question = rollout.question
    return guarded("result", lambda: verdict(rollout.answer, question.solution, question.question), False)
