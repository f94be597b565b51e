"""Group-relative advantages: how much better a rollout did than the others of its question (arXiv 2402.03300)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-4


def group_advantages(rewards: Tensor, scale: Literal["std", "none"] = "std") -> Tensor:
    """A = (r - mean) / (std + 1e-4) within each group; std with Bessel's correction.

    Args:
        rewards: [P, G] float, one row per question, G >= 2 rollouts each.
        scale: "std" (GRPO) or "none", which leaves r - mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [P, G], the dtype of `rewards`. A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: wrong shape, a group of one, a reward that is not finite, or an unknown scale.
    """
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be floats of shape [questions, group], got {rewards.dtype} {list(rewards.shape)}"
        )
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 rollouts to have a baseline, got {rewards.shape[1]}")
    if scale not in ("std", "none"):
        raise ValueError(f"advantage scale is {scale!r}; it must be 'std' or 'none'")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite, got {rewards[~rewards.isfinite()][:4].tolist()}")
    rewards64 = rewards.double()
    advantages = rewards64 - rewards64.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (rewards64.std(dim=1, keepdim=True) + STD_EPSILON)
    # The mean of equal numbers can differ from them by a rounding, which the division would blow up.
    return advantages.masked_fill(zero_spread(rewards)[:, None], 0.0).to(rewards.dtype)


def zero_spread(rewards: Tensor) -> Tensor:
    """[P] bool: groups in which every rollout earned the same reward, so that no gradient comes from them."""
    return rewards.amin(dim=1) == rewards.amax(dim=1)


class Credit(NamedTuple):
    """What a rollout's tokens count from one of its rounds on, up to where its next credit begins."""

    round: int
    advantage: float


def branch_advantages(
    rewards: Sequence[float], parents: Sequence[tuple[int, int] | None], scale: Literal["std", "none"] = "std"
) -> list[list[Credit]]:
    """Advantages within the siblings of each branch point, in place of within the whole group.

    Where rollouts branch off another one at the start of a round, they and what that one did from there on are
    siblings: the advantage of each there is over their rewards alone, as `group_advantages` has it. What came before
    is worth the mean over the siblings, and has its advantage among its own siblings: the rollouts that begin at the
    prompt, or those of an earlier branch point. Every token is credited once, in the rollout that drew it. One without
    siblings has advantage 0: nothing is known of what else could have been done there.

    Args:
        rewards: of the rollouts of one question.
        parents: of each, the (place in `rewards`, round) at which it branched off; None where it began at the prompt.
        scale: as in `group_advantages`.

    Returns:
        For each rollout its credits by ascending round, from the first round that it drew itself.

    Raises:
        ValueError: as `group_advantages` does, or parents that are no trees.
    """
    if len(parents) != len(rewards):
        raise ValueError(f"branch_advantages: {len(parents)} parents for {len(rewards)} rewards")
    points = [_branch_point(place, parents) for place in range(len(rewards))]
    children: dict[tuple[int, int], list[int]] = {}
    for place, point in enumerate(points):
        if point is not None:
            children.setdefault(point, []).append(place)
    starts = [
        [0 if point is None else point[1], *sorted(round for of, round in children if of == place)]
        for place, point in enumerate(points)
    ]
    credits: list[list[Credit]] = [[] for _ in rewards]

    def worth(place: int, segment: int) -> float:
        """Of what a rollout did up to its branch point after this segment, from which on its siblings differ."""
        if segment + 1 == len(starts[place]):
            return rewards[place]
        at = starts[place][segment + 1]
        siblings = [(place, segment + 1), *((child, 0) for child in children[place, at])]
        return share(siblings)

    def share(siblings: list[tuple[int, int]]) -> float:
        """Credits siblings among each other, and returns what they are worth together."""
        values = [worth(*sibling) for sibling in siblings]
        found = [0.0] * len(values)
        if len(values) > 1:
            found = group_advantages(torch.tensor([values], dtype=torch.float64), scale)[0].tolist()
        for (place, segment), advantage in zip(siblings, found, strict=True):
            credits[place].append(Credit(starts[place][segment], advantage))
        return sum(values) / len(values)

    share([(place, 0) for place, point in enumerate(points) if point is None])
    return [sorted(of) for of in credits]


def _branch_point(place: int, parents: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Where a rollout branched off, by the rollout that drew the round before; one at the first round of another is a
    sibling of that one. None at the prompt."""
    point, seen = parents[place], {place}
    while point is not None:
        of, round = point
        if of in seen or not 0 <= of < len(parents):
            raise ValueError(f"branch_advantages: the parents of rollout {place} are no tree")
        seen.add(of)
        above = parents[of]
        if round > (0 if above is None else above[1]):
            return point
        point = None if above is None else (above[0], round)
    return None
