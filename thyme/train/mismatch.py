"""Tokens that the engine drew with another probability than the trainer gives them, and which of them are left out.

Engine and trainer round differently, and an engine may lag behind by some steps. The ratio of a token is the trainer's
probability, under the policy before the batch's first update, over the one that the engine recorded. Truncated
importance sampling weighs a token by it (`rl.loss.rollout_ratio_cap`); masked importance sampling, here, leaves out
what lies too far from 1 and takes the rest as it is. Where the two differ by more than rounding and age explain, the
run is broken, and says so or ends (`rl.mismatch.on_mismatch`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from thyme.train.config import MismatchConfig
from thyme.train.metrics import Metrics
from thyme.train.packing import TrainBatch


class MismatchError(ValueError):
    """Trainer and engine do not mean the same by a log-prob; nothing was updated with it."""


SEGMENTS = ("text", "code")
"""By `TrainBatch.segments`."""
KL = "mismatch/kl"


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


def divergence_sums(batch: TrainBatch, names: Mapping[int, str]) -> dict[str, tuple[float, int]]:
    """By metric, the sum over a micro-batch's trained tokens of the divergence from engine to trainer, ratio - log
    ratio - 1 in nats (the estimator of the loss's own metric), and how many tokens it is over.

    Args:
        batch: on the CPU, with old and rollout log-probs.
        names: of the phases that have a metric of their own, by number (`RolloutConfig.phase_names`).
    """
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None and batch.segments is not None
    log_ratio = (batch.old_logprobs - batch.rollout_logprobs).double()
    found = log_ratio.expm1() - log_ratio  # also of a single differing bit it is not 0
    parts = {KL: found}
    for number, name in names.items():
        assert batch.phases is not None
        parts[f"{KL}_{name}"] = found[batch.phases == number]
    parts |= {f"{KL}_{name}": found[batch.segments == number] for number, name in enumerate(SEGMENTS)}
    return {name: (float(part.sum()), len(part)) for name, part in parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The trained token on which trainer and engine differ most."""

    rollout: str
    """Question and index in its group."""
    token: int
    """Place in the rollout, prompt included."""
    token_id: int
    phase: str
    trainer: float
    """Its log-prob, in nats at the token's temperature."""
    engine: float

    @property
    def difference(self) -> float:
        """In nats; infinite where one of the two is no number."""
        difference = abs(self.trainer - self.engine)
        return difference if math.isfinite(difference) else math.inf

    def __str__(self) -> str:
        return (
            f"rollout {self.rollout}, token {self.token} (id {self.token_id}, in {self.phase}): log-prob "
            f"{self.trainer:.9g} in the trainer, {self.engine:.9g} in the engine"
        )


def worst_token(batch: TrainBatch, names: Mapping[int, str]) -> Worst | None:
    """Of a micro-batch, with arguments as `divergence_sums`; None where nothing is trained."""
    assert batch.old_logprobs is not None and batch.rollout_logprobs is not None and batch.segments is not None
    if not len(batch.rows):
        return None
    difference = (batch.old_logprobs - batch.rollout_logprobs).abs().double()
    row = int(difference.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    sequence = int(torch.searchsorted(batch.cu_seqlens, row, right=True)) - 1
    before = int(batch.rows[row])
    place = before - sum(batch.lengths[:sequence]) if batch.tree is None else batch.tree.place_of(before)
    return Worst(
        rollout=batch.names[sequence] if sequence < len(batch.names) else f"{sequence} of a micro-batch",
        token=place + 1,
        token_id=int(batch.targets[row]),
        phase=names.get(-1 if batch.phases is None else int(batch.phases[row]), SEGMENTS[int(batch.segments[row])]),
        trainer=float(batch.old_logprobs[row]),
        engine=float(batch.rollout_logprobs[row]),
    )


def refuse_mismatch(
    divergences: Sequence[dict[str, tuple[float, int]]], worst: Sequence[Worst | None], config: MismatchConfig
) -> None:
    """Ends the run before an update where trainer and engine differ by more than `max_kl` in the mean or `max_token` on
    one token.

    Args:
        divergences, worst: of every micro-batch, on all ranks.

    Raises:
        MismatchError: names the rollout, the token, its phase and both log-probs.
    """
    found = [each for each in worst if each is not None]
    if not found:
        return
    first = max(found, key=lambda each: each.difference)
    wrong = mismatch_in(mean_divergence(divergences), config)
    if wrong is None and config.max_token is not None and first.difference > config.max_token:
        wrong = (
            f"trainer and engine differ by {first.difference:.3g} nats on a token, more than rl.mismatch.max_token "
            f"({config.max_token})"
        )
    if wrong is not None:
        raise MismatchError(f"{wrong}. They differ most on {first}. Nothing was updated with this batch")


def mean_divergence(parts: Sequence[dict[str, tuple[float, int]]]) -> Metrics:
    """Of all micro-batches; without the phases that have no token."""
    totals: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (divergence, count) in part.items():
            before = totals.get(name, (0.0, 0))
            totals[name] = before[0] + divergence, before[1] + count
    return {name: divergence / count for name, (divergence, count) in totals.items() if count}


def mismatch_in(metrics: Metrics, config: MismatchConfig) -> str | None:
    """What is wrong, in words, where a divergence is above `max_kl` or no number."""
    for name in sorted(name for name in metrics if name.startswith(KL)):
        if not metrics[name] <= config.max_kl:
            where = f"in {name.removeprefix(KL + '_')}" if name != KL else "over all trained tokens"
            return (
                f"trainer and engine differ by {metrics[name]:.3g} nats a token {where}, more than rl.mismatch.max_kl "
                f"({config.max_kl}): look at engine.head_dtype, dtypes, and what samples otherwise than it records"
            )
    return None


def mask_metrics(parts: Sequence[Masked]) -> Metrics:
    """The shares of trained tokens, and of trained rollouts, that the mask touched; nothing of nothing."""
    tokens, sequences = sum(part.all_tokens for part in parts), sum(part.all_sequences for part in parts)
    if not tokens:
        return {}
    return {
        "mismatch/masked_tokens": sum(part.tokens for part in parts) / tokens,
        "mismatch/masked_rollouts": sum(part.sequences for part in parts) / sequences,
    }
