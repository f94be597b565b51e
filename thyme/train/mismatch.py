"""Tokens that the engine drew with another probability than the trainer gives them, and which of them are left out.

Engine and trainer round differently, and an engine may lag behind by some steps. The ratio of a token is the trainer's
probability, under the policy before the batch's first update, over the one that the engine recorded. Truncated
importance sampling weighs a token by it (`rl.loss.rollout_ratio_cap`); masked importance sampling, here, leaves out
what lies too far from 1 and takes the rest as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from thyme.train.config import MismatchConfig
from thyme.train.metrics import Metrics
from thyme.train.packing import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """What was left out of one micro-batch, of how much."""

    tokens: int
    sequences: int
    """With a token left out."""
    all_tokens: int
    all_sequences: int

    @classmethod
    def of(cls, batch: TrainBatch, kept: Tensor) -> Self:
        """kept: [N] bool."""
        out = ~kept
        per_sequence = torch.tensor([bool(part.any()) for part in out.split(batch.cu_seqlens.diff().tolist())])
        return cls(
            tokens=int(out.sum()),
            sequences=int(per_sequence.sum()),
            all_tokens=len(kept),
            all_sequences=len(per_sequence),
        )


def masked(batch: TrainBatch, config: MismatchConfig) -> tuple[TrainBatch, Masked]:
    """The batch with weight 0 where the ratio is outside `low` to `high` or no number.

    The weights of what stays are as they were: it is not scaled up for what is left out.

    Args:
        batch: on the CPU, with old and rollout log-probs.
        config: its mask is not "none".
    """
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None
    log_ratio = (batch.old_logprobs - batch.rollout_logprobs).double()
    if config.mask == "sequence":
        lengths = batch.cu_seqlens.diff().tolist()
        means = [part.mean().expand(len(part)) for part in log_ratio.split(lengths)]
        log_ratio = torch.cat(means) if means else log_ratio
    ratio = log_ratio.exp()
    kept = (ratio >= config.low) & (ratio <= config.high)
    weights = batch.weights * kept
    return replace(batch, weights=weights, num_weighted=int(weights.count_nonzero())), Masked.of(batch, kept)


def mask_metrics(parts: Sequence[Masked]) -> Metrics:
    """The shares of trained tokens, and of trained rollouts, that the mask touched; nothing of nothing."""
    tokens, sequences = sum(part.all_tokens for part in parts), sum(part.all_sequences for part in parts)
    if not tokens:
        return {}
    return {
        "mismatch/masked_tokens": sum(part.tokens for part in parts) / tokens,
        "mismatch/masked_rollouts": sum(part.sequences for part in parts) / sequences,
    }
