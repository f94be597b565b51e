"""What is minimised: per-token weights for every normalisation, the supervised loss, the policy loss.

Both losses are sums over trained tokens of weight * loss, so a normalisation is nothing but the weights, and the
micro-batches of a batch add up. Logits exist only for the rows that are trained, and with `fused_head` not even those:
the LM head's product is part of the loss. Ids that may not be sampled have probability 0 here as they have in the
sampler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor

from thyme.kernels.grpo_loss import GrpoLossConfig, GrpoMetrics, grpo_loss
from thyme.kernels.linear_grpo_loss import linear_grpo_loss
from thyme.kernels.linear_logprob import linear_logprob
from thyme.kernels.token_logprobs import token_logprobs
from thyme.kernels.truncated_logprobs import truncated_logprobs
from thyme.model.attention import PackedAttention
from thyme.model.layers import MIN_ROWS
from thyme.model.lora import adapters_off
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.model.tree_attention import TreeAttention
from thyme.rollout.config import RolloutConfig
from thyme.train.attention import RolloutAttention
from thyme.train.config import Normalization
from thyme.train.distributed import World
from thyme.train.packing import Sample, TrainBatch
from thyme.train.sharding import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedIds:
    """The ids that have a probability: below `size`, not banned, and kept where rollouts are truncated. The same in the
    sampler."""

    size: int
    banned_ids: tuple[int, ...]
    limits: tuple[tuple[int, float, float], ...] = ()
    """(top_k, top_p, min_p) of each phase, by number; none where nothing is truncated."""

    @classmethod
    def of(cls, processor: Processor, rollout: RolloutConfig | None = None) -> Self:
        limits: tuple[tuple[int, float, float], ...] = ()
        if rollout is not None and rollout.truncates:
            limits = rollout.limits_by_phase()
        return cls(size=processor.vocab_size, banned_ids=tuple(processor.never_sampled_ids), limits=limits)

    def cuts(self, batch: TrainBatch) -> dict[str, Any]:
        """How the batch's rows are truncated, as the ops take it: one for all, or one a row where phases differ; empty
        where nothing is."""
        cuts: dict[str, Any] = {}
        columns = zip(("top_k", "top_p", "min_p"), (0, 1.0, 0.0), zip(*self.limits, strict=True), strict=True)
        for name, off, by_phase in columns if self.limits else ():
            if len(set(by_phase)) > 1:
                assert batch.phases is not None
                dtype = torch.int64 if name == "top_k" else torch.float32
                cuts[name] = torch.tensor(by_phase, dtype=dtype, device=batch.phases.device)[batch.phases.long()]
            elif by_phase[0] != off:
                cuts[name] = by_phase[0]
        return cuts


def normalize(
    groups: Sequence[Sequence[Sample]],
    normalization: Normalization,
    *,
    constant: int | None = None,
    world: World | None = None,
) -> list[Sample]:
    """The samples of all groups, their 0/1 weights divided by the denominator over the whole global batch.

    Args:
        groups: every rollout of the batch, by question, those that teach nothing included: they count.
        normalization: "group_tokens" (Thyme, GRPO): mean over the trained tokens of a group, then over groups;
            "batch_tokens" (DAPO, and supervised training): mean over all trained tokens; "sequence_mean" (what
            Thyme's release runs): mean within each rollout, then over rollouts; "constant" (Dr. GRPO): sum over
            `constant` tokens, then mean over rollouts.
        constant: tokens; for "constant" only.
        world: over whose ranks the batch is spread; `groups` are then this rank's, each a whole one.

    Raises:
        ValueError: unknown normalization, or "constant" without a positive constant.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization is {normalization!r}; use one of {', '.join(get_args(Normalization))}")
    if normalization == "constant" and not constant:
        raise ValueError("normalization 'constant' needs the number of tokens to divide by")
    samples = [sample for group in groups for sample in group]
    counts = [[float(np.count_nonzero(sample.weights)) for sample in group] for group in groups]
    totals = [len(samples), len(groups), sum(map(sum, counts))]
    num_samples, num_groups, num_tokens = totals if world is None else world.sum(totals)
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


def trained_hidden(model: Model, batch: TrainBatch) -> Tensor:
    """Hidden states [N, H] of the rows that predict a trained token."""
    features = None
    if batch.pixel_values is not None:
        features = model.encode_images(batch.pixel_values, batch.grids)
        if batch.feature_rows is not None:
            features = features[batch.feature_rows]
    hidden: Tensor = model(
        batch.input_ids,
        batch.positions,
        _attention(batch),
        image_features=features,
        image_positions=batch.image_positions,
    )
    return hidden[batch.rows]


def _attention(batch: TrainBatch) -> PackedAttention:
    if batch.same_bits:
        return RolloutAttention(batch.lengths, batch.tree)
    return PackedAttention(batch.lengths) if batch.tree is None else TreeAttention(batch.tree)


def trained_logits(model: Model, batch: TrainBatch) -> Tensor:
    """Logits [N, V] of the rows that predict a trained token."""
    return _logits(model, trained_hidden(model, batch))


def _logits(model: Model, hidden: Tensor) -> Tensor:
    return model.logits(hidden, min_rows=MIN_ROWS)


def trained_logprobs(
    model: Model,
    batch: TrainBatch,
    allowed: AllowedIds,
    temperature: Tensor | None = None,
    *,
    fused_head: bool,
    gradient: Tensor | None = None,
) -> Tensor:
    """Log-probabilities [N] of the trained tokens, at temperature 1 or their own [N], those of the batch, over the ids
    that are kept; `gradient` [N], if it is known, is that of the loss in them: see `linear_logprob`."""
    among: Any = {"vocab_size": allowed.size, "banned_ids": allowed.banned_ids}
    among["temperature"] = temperature if batch.tempered or allowed.limits else None  # a greedy token keeps all ids
    hidden = trained_hidden(model, batch)
    if fused_head:
        _refuse_cuts(allowed)
        among["logprob_gradient"] = gradient
        return linear_logprob(hidden, model.lm_head_weight, batch.targets, **among)[0]
    if allowed.limits:
        return truncated_logprobs(_logits(model, hidden), batch.targets, **among, **allowed.cuts(batch))[0]
    return token_logprobs(_logits(model, hidden), batch.targets, **among)[0]


def _refuse_cuts(allowed: AllowedIds) -> None:
    if allowed.limits:
        raise ValueError(
            "the fused LM head has no logits to truncate by top_k, top_p or min_p: train without fused_head"
        )


def supervised_losses(model: Model, batch: TrainBatch, allowed: AllowedIds, *, fused_head: bool = False) -> Tensor:
    """[N] weight times negative log-probability, of each trained token; what is differentiated is their sum."""
    logprobs = trained_logprobs(model, batch, allowed, fused_head=fused_head, gradient=-batch.weights)
    return -(batch.weights * logprobs)


def supervised_loss(model: Model, batch: TrainBatch, allowed: AllowedIds, *, fused_head: bool = False) -> Tensor:
    """Their sum."""
    return supervised_losses(model, batch, allowed, fused_head=fused_head).sum()


def rollout_loss(
    model: Model,
    batch: TrainBatch,
    allowed: AllowedIds,
    config: GrpoLossConfig,
    *,
    reference: Model | TrainedModel | None = None,
    fused_head: bool = False,
) -> tuple[Tensor, GrpoMetrics]:
    """The GRPO loss of one micro-batch, with KL to `reference` if there is one; on-policy without old log-probs."""
    ref_logprobs = batch.ref_logprobs
    if reference is not None and ref_logprobs is None:
        ref_logprobs = reference_logprobs(reference, batch, allowed, fused_head=fused_head)
    assert batch.advantages is not None
    hidden = trained_hidden(model, batch)
    loss_of: Callable[..., tuple[Tensor, GrpoMetrics]]
    if fused_head:
        _refuse_cuts(allowed)
        known: Any = {"num_counted": batch.num_weighted, "tempered": batch.tempered}
        loss_of = partial(linear_grpo_loss, hidden, model.lm_head_weight, **known)
    else:
        loss_of = partial(grpo_loss, _logits(model, hidden), **allowed.cuts(batch))
    return loss_of(
        batch.targets,
        batch.advantages,
        batch.weights,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        temperature=batch.temperatures,
        cu_seqlens=batch.cu_seqlens,
        segments=batch.segments,
        vocab_size=allowed.size,
        banned_ids=allowed.banned_ids,
        config=config,
    )


@torch.no_grad()
def reference_logprobs(
    reference: Model | TrainedModel, batch: TrainBatch, allowed: AllowedIds, *, fused_head: bool = False
) -> Tensor:
    """[N] log-probabilities of the trained tokens under the reference, at each token's temperature, 1 where greedy.

    The reference is read without its adapters, so a policy that has some may be its own.
    """
    if isinstance(reference, TrainedModel):
        return reference(trained_logprobs, batch, allowed, batch.temperatures, fused_head=fused_head)
    with adapters_off(reference):
        return trained_logprobs(reference, batch, allowed, batch.temperatures, fused_head=fused_head)
