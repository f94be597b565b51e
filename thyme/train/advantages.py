"""Group-relative advantages: how much better a rollout did than the others of its question (arXiv 2402.03300)."""

from typing import Literal

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
