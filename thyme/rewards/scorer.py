"""Who scores the rollouts of a step: group by group, as they end, while the others still decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from thyme.rewards.reward import Reward, scored
from thyme.rollout.types import Rollout


class ScorerError(ValueError):
    """No group can be scored as things are, and none ever was: a key is refused, a reward function fails on its first
    group. It should end the run before more time is lost."""


class Scorer(Protocol):
    """Scores whole groups. A training step submits each as its last rollout ends and collects them all at the end."""

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        """The rewards of a question's rollouts, in their order.

        What a reward function raises is a reward of 0 with `error` set. A group that could not be judged (the judge is
        unreachable) is no group of zeros: its future raises `thyme.rewards.judge.JudgeUnavailable`, and the step leaves
        it out.

        Raises:
            ScorerError: scoring cannot work; the future of the group in which that was found raises it too.
        """

    def metrics(self) -> dict[str, float]:
        """What was measured since the last call: numbers for a step's row, none where scoring is all by rules."""


class RuleScorer:
    """Scores at once, on the calling thread: for rewards that are rules.

    Args:
        score: the reward of one rollout.
    """

    def __init__(self, score: Callable[[Rollout], Reward]) -> None:
        self._score = score

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        future: Future[list[Reward]] = Future()
        future.set_result([scored(rollout, self._score) for rollout in group])
        return future

    def metrics(self) -> dict[str, float]:
        return {}
