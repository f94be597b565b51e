"""What is minimised: per-token weights for every normalisation, the supervised loss, the policy loss.

Both losses are sums over trained tokens of weight * loss, so a normalisation is nothing but the weights, and the
micro-batches of a batch add up. Logits exist only for the rows that are trained. Ids that may not be sampled have
probability 0 here as they have in the sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

import numpy as np
import torch
from torch import Tensor

from thyme.kernels.grpo_loss import GrpoLossConfig, GrpoMetrics, grpo_loss, token_logprobs
from thyme.model.attention import PackedAttention
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.train.config import Normalization
from thyme.train.packing import Sample, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The ids that have a probability: below `size` and not banned. The same in the sampler."""

    size: int
    banned_ids: tuple[int, ...]

    @classmethod
    def of(cls, processor: Processor) -> Self:
        return cls(size=processor.vocab_size, banned_ids=tuple(processor.never_sampled_ids))


def normalize(
    groups: Sequence[Sequence[Sample]], normalization: Normalization, *, constant: int | None = None
) -> list[Sample]:
    """The samples of all groups, their 0/1 weights divided by the denominator over the whole global batch.

    Args:
        groups: every rollout of the batch, by question, those that teach nothing included: they count.
        normalization: "group_tokens" (Thyme, GRPO): mean over the trained tokens of a group, then over groups;
            "batch_tokens" (DAPO, and supervised training): mean over all trained tokens; "sequence_mean" (what
            Thyme's release runs): mean within each rollout, then over rollouts; "constant" (Dr. GRPO): sum over
            `constant` tokens, then mean over rollouts.
        constant: tokens; for "constant" only.

    Raises:
        ValueError: unknown normalization, or "constant" without a positive constant.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization is {normalization!r}; use one of {', '.join(get_args(Normalization))}")
    if normalization == "constant" and not constant:
        raise ValueError("normalization 'constant' needs the number of tokens to divide by")
    samples = [sample for group in groups for sample in group]
    counts = [[float(np.count_nonzero(sample.weights)) for sample in group] for group in groups]
    num_samples, num_groups, num_tokens = len(samples), len(groups), sum(map(sum, counts))
    denominators = []
    for group in counts:
        for count in group:
            denominators.append(
                {
                    "group_tokens": num_groups * sum(group),
                    "batch_tokens": num_tokens,
                    "sequence_mean": num_samples * count,
                    "constant": float(num_samples * (constant or 1)),
                }[normalization]
            )
    # A denominator of 0 belongs to weights that are all 0.
    return [
        replace(sample, weights=sample.weights / np.float32(denominator or 1.0))
        for sample, denominator in zip(samples, denominators, strict=True)
    ]


def trained_logits(model: Model, batch: TrainBatch) -> Tensor:
    """Logits [N, V] of the rows that predict a trained token."""
    features = None
    if batch.pixel_values is not None:
        features = model.encode_images(batch.pixel_values, batch.grids)
        if batch.feature_rows is not None:
            features = features[batch.feature_rows]
    hidden = model(
        batch.input_ids,
        batch.positions,
        PackedAttention(batch.lengths),
        image_features=features,
        image_positions=batch.image_positions,
    )
    return model.logits(hidden[batch.rows])


def supervised_loss(model: Model, batch: TrainBatch, vocabulary: Vocabulary) -> Tensor:
    """Weighted sum of the negative log-probabilities of the trained tokens."""
    logits = trained_logits(model, batch)
    logprobs = token_logprobs(logits, batch.targets, vocab_size=vocabulary.size, banned_ids=vocabulary.banned_ids)[0]
    return -(batch.weights * logprobs).sum()


def policy_loss(
    model: Model,
    batch: TrainBatch,
    vocabulary: Vocabulary,
    config: GrpoLossConfig,
    *,
    reference: Model | None = None,
) -> tuple[Tensor, GrpoMetrics]:
    """The GRPO loss of one micro-batch, on-policy (the ratio is 1), with KL to `reference` if there is one."""
    ref_logprobs = None if reference is None else reference_logprobs(reference, batch, vocabulary)
    assert batch.advantages is not None
    return grpo_loss(
        trained_logits(model, batch),
        batch.targets,
        batch.advantages,
        batch.weights,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        temperature=batch.temperatures,
        cu_seqlens=batch.cu_seqlens,
        segments=batch.segments,
        vocab_size=vocabulary.size,
        banned_ids=vocabulary.banned_ids,
        config=config,
    )


@torch.no_grad()
def reference_logprobs(reference: Model, batch: TrainBatch, vocabulary: Vocabulary) -> Tensor:
    """[N] log-probabilities of the trained tokens under the reference, at each token's temperature, 1 where greedy."""
    return token_logprobs(
        trained_logits(reference, batch),
        batch.targets,
        temperature=batch.temperatures,
        vocab_size=vocabulary.size,
        banned_ids=vocabulary.banned_ids,
    )[0]
