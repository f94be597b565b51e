"""Answers by more than one try: a failed call of a tool drawn again, and the answer that most branches agree on."""

from collections import Counter
from collections.abc import Sequence

from thyme.rollout.branching import places
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Rollout


def retried(
    loop: RolloutLoop, groups: Sequence[Sequence[Rollout]], attempts: int, sampling: Sampling
) -> list[list[Rollout]]:
    """Each rollout, or where its code failed what came of drawing that round again, `attempts` times at most.

    Args:
        loop: drew them.
        sampling: of the retries; at temperature 0 they would fail the same way.
    """
    flat = loop.retry_each([rollout for group in groups for rollout in group], attempts, sampling)
    rollouts = iter(flat)
    return [[next(rollouts) for _ in group] for group in groups]


def best_of(loop: RolloutLoop, groups: Sequence[Sequence[Rollout]], n: int, sampling: Sampling) -> list[list[Rollout]]:
    """Of each rollout and n - 1 branches of it one that gives the answer that most of them give, the rollout itself
    before others where several do.

    Args:
        loop: drew them.
        n: rollouts that vote.
        sampling: of the branches, which begin where the entropy at the start of a round is highest.
    """
    flat = [rollout for group in groups for rollout in group]
    stems = [(rollout, places([rollout], 1, TreeConfig())[0][1]) for rollout in flat]
    branches = loop.fork_each(stems, n - 1, sampling)
    chosen = iter(_voted([rollout, *others]) for rollout, others in zip(flat, branches, strict=True))
    return [[next(chosen) for _ in group] for group in groups]


def _voted(rollouts: Sequence[Rollout]) -> Rollout:
    """The first with the most frequent answer; none is no answer."""
    votes = Counter(rollout.answer for rollout in rollouts if rollout.answer is not None)
    return max(rollouts, key=lambda rollout: votes[rollout.answer or ""])  # the first of equals
