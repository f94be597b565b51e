"""The rewards of a step's groups: asked for as each group ends, while others still decode, and collected after."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from thyme import trace
from thyme.rewards import Reward, Scorer
from thyme.rewards.scorer import ScorerError
from thyme.rollout.types import Rollout, RolloutStatus
from thyme.train.config import Truncated

TRUNCATED = frozenset({RolloutStatus.LENGTH, RolloutStatus.CONTEXT, RolloutStatus.ABORTED})
"""Ends that are not the model's doing: it would have gone on. A repetition is its doing."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroup:
    """The rollouts of one question, by index, and what each earned."""

    rollouts: list[Rollout]
    rewards: list[Reward] | None
    """None where the group could not be scored: nothing is known of it, and it is no group of zeros."""
    rank: int = 0
    """Which rank sampled it, and has its pictures."""

    def totals(self, truncated: Truncated) -> list[float]:
        """What each rollout earned, as advantages are computed from it; [] where the group could not be scored."""
        rewards = zip(self.rollouts, self.rewards or (), strict=self.rewards is not None)
        is_zero = truncated == "zero"
        return [0.0 if is_zero and rollout.status in TRUNCATED else reward.total for rollout, reward in rewards]


class GroupScores:
    """Submits each group of one `RolloutLoop.run` when its last rollout ends; `ended` is the run's `on_end`.

    Args:
        scorer: gets every group once, rollouts by index.
        group_size: rollouts of a question.
    """

    def __init__(self, scorer: Scorer, group_size: int) -> None:
        self._scorer, self._group_size = scorer, group_size
        self._open: dict[int, dict[int, Rollout]] = {}
        self._submitted: dict[int, Future[list[Reward]]] = {}
        self._whole: dict[int, list[Rollout]] = {}

    def ended(self, rollout: Rollout) -> None:
        """Takes one rollout that has just ended."""
        group = self._open.setdefault(rollout.group, {})
        group[rollout.index] = rollout
        if len(group) == self._group_size:
            whole = self._open.pop(rollout.group)
            self._whole[rollout.group] = [whole[index] for index in sorted(whole)]
            asked, name = trace.now(), rollout.question.id
            with trace.span("loop", "submit for scoring"):
                future = self._scorer.submit(self._whole[rollout.group])
            future.add_done_callback(lambda _: trace.add("rewards", name, asked, ("group", rollout.group, asked)))
            self._submitted[rollout.group] = future

    def collect(self, groups: Sequence[Sequence[Rollout]]) -> list[ScoredGroup]:
        """Waits for the rewards of every group; one whose future raises has none, and is named in the log.

        Args:
            groups: what the run returned.

        Raises:
            ValueError: the scorer gave another number of rewards than the group has rollouts, or can score none.
        """
        return [
            ScoredGroup(rollouts=list(group), rewards=self._rewards(index, group)) for index, group in enumerate(groups)
        ]

    def so_far(self) -> list[ScoredGroup]:
        """The groups whose rollouts have all ended, of a run that did not come to its end; see `collect`."""
        return [
            ScoredGroup(rollouts=group, rewards=self._rewards(index, group))
            for index, group in sorted(self._whole.items())
        ]

    def _rewards(self, index: int, group: Sequence[Rollout]) -> list[Reward] | None:
        question = group[0].question.id
        try:
            rewards = self._submitted[index].result()
        except ScorerError:
            raise
        except Exception as error:  # whatever a judge's client raises
            _log.warning(
                "question %r: not scored, its group is left out: %s: %s", question, type(error).__name__, error
            )
            return None
        if len(rewards) != len(group):
            raise ValueError(f"question {question!r}: the scorer gave {len(rewards)} rewards for {len(group)} rollouts")
        return rewards
