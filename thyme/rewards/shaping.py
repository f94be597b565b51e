"""What is added to a reward to shape length and tool use; each is off unless a config says otherwise."""

from __future__ import annotations

from thyme.rollout.types import Rollout


def overlong(tokens: int, limit: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's soft punishment of long responses (Yu et al. 2025): never positive.

    Nothing up to `limit - buffer` tokens, then linearly down to `-penalty` at `limit` and beyond, so that a policy
    feels the limit before its responses are cut there.

    Args:
        tokens: that the policy drew, over all rounds (`Rollout.num_sampled`).
        limit: the most it may draw (`RolloutConfig.max_tokens`).
        buffer: tokens before the limit in which the punishment grows.
        penalty: what is lost at the limit.

    Raises:
        ValueError: a buffer below 1 or above the limit.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"overlong: a buffer of {buffer} tokens must be from 1 to the limit, {limit}")
    over = min(max(tokens - (limit - buffer), 0), buffer)
    return -penalty * over / buffer if over else 0.0


def tool_bonus(rollout: Rollout, bonus: float, most: int) -> float:
    """`bonus` for each code block that ran without an error, for `most` of them at most.

    PyVision-RL (arXiv 2602.20739) pays such an accumulative tool reward, on right answers alone, against policies that
    unlearn their tools. The cap is not theirs: without one, needless code pays. Thyme's authors report that a reward
    for code made their model write useless code, so a config has it off.
    """
    runs = sum(turn.result is not None and turn.result.status.name == "OK" for turn in rollout.turns)
    return bonus * min(runs, most)
