"""The optimizer steps on one batch of rollouts: one, or several over mini-batches and epochs.

The ratio of the loss is taken against the policy that the batch's first update starts from, whose log-probs of every
trained token are computed once, before that update, at each token's temperature (1 where greedy). With one update a
batch that policy is the one being trained: the ratio is 1 by definition, and nothing is computed before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thyme import trace
from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.train.balance import aligned
from thyme.train.config import RlConfig
from thyme.train.metrics import Metrics
from thyme.train.mismatch import (
    Masked,
    Worst,
    divergence_sums,
    mask_metrics,
    masked,
    mean_divergence,
    refuse_mismatch,
    worst_token,
)
from thyme.train.objective import AllowedIds, reference_logprobs, rollout_loss, trained_logprobs
from thyme.train.optim import Optimizer
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.rl_metrics import LossMetrics
from thyme.train.sharding import TrainedModel
from thyme.train.sharing_metrics import Shared
from thyme.train.supervised import step_metrics, suspects
from thyme.train.trainable import fuses_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer step, made or not."""

    loss: LossMetrics
    """Of its micro-batches; nothing where there was nothing to train."""
    optim: Metrics
    """optim/grad_norm, optim/rate_share, and optim/skipped where it is not finite."""
    suspects: tuple[str, ...] = ()
    """Names of the rollouts that may be why it was not finite."""


def packed_batches(
    trained: TrainedModel,
    processor: Processor,
    batches: Sequence[Sequence[Sample]],
    config: RlConfig,
    *,
    reference: Model | TrainedModel | None,
    same_bits: bool,
    rollout: RolloutConfig | None = None,
    on_packed: Callable[[list[TrainBatch]], object] | None = None,
) -> tuple[list[list[TrainBatch]], Metrics]:
    """The micro-batches of every mini-batch, with what is computed once, and without what the mismatch mask leaves out.

    Old log-probs are computed where `config.needs_old_logprobs`, the reference's where there are several epochs.

    Args:
        trained: the policy before the first update.
        batches: the samples of each mini-batch, on whichever rank.
        reference: of the KL term.
        same_bits: see `TrainBatch`.
        rollout: how the samples were drawn, where they may be truncated.
        on_packed: is given each mini-batch of this rank with its old log-probs, if any, before anything is masked.

    Returns:
        This rank's micro-batches in which something is trained, and how much was masked and shared on all ranks.

    Raises:
        MismatchError: trainer and engine disagree, and `config.mismatch.on_mismatch` is "abort".
    """
    allowed, image_id = AllowedIds.of(processor, rollout), processor.image_token_id
    names = {} if rollout is None else rollout.phase_names
    parts: list[list[TrainBatch]] = []
    left_out: list[Masked] = []
    divergences: list[dict[str, tuple[float, int]]] = []
    sharing: list[Shared] = []
    worst: list[Worst | None] = []
    for samples in batches:
        own = [sample for sample in samples if sample.rank == trained.world.rank]
        limits: Any = {"max_tokens": config.max_tokens_per_micro_batch, "share_prefixes": config.share_prefixes}
        packed = pack(own, image_token_id=image_id, **limits)
        sharing.append(Shared.of(own, packed, image_id))
        part = [replace(batch, same_bits=same_bits) for batch in packed]
        if config.needs_old_logprobs:
            part = with_old_logprobs(trained, part, allowed, config)
        if on_packed is not None:
            on_packed(part)
        if config.mismatch.on_mismatch == "abort":
            divergences += [divergence_sums(batch, names) for batch in part]
            worst += [worst_token(batch, names) for batch in part]
        if config.mismatch.mask != "none":
            pairs = [masked(batch, config.mismatch) for batch in part]
            left_out += [found for _, found in pairs]
            part = [batch for batch, _ in pairs if batch.weights.any()]
        if reference is not None and config.epochs_per_batch > 1:
            part = with_ref_logprobs(reference, part, allowed, config, trained)
        parts.append(part)
    everywhere = trained.world.gather((left_out, divergences, worst, sharing))
    metrics = mask_metrics([part for rank, _, _, _ in everywhere for part in rank])
    if config.mismatch.on_mismatch == "abort":
        found = [part for _, rank, _, _ in everywhere for part in rank]
        refuse_mismatch(found, [each for _, _, rank, _ in everywhere for each in rank], config.mismatch)
        metrics |= mean_divergence(found)
    return parts, metrics | Shared.metrics([part for _, _, _, rank in everywhere for part in rank])


def update_policy(
    trained: TrainedModel,
    processor: Processor,
    optimizer: Optimizer,
    batches: Sequence[Sequence[TrainBatch]],
    config: RlConfig,
    *,
    reference: Model | TrainedModel | None,
    rate: float,
    rollout: RolloutConfig | None = None,
) -> list[Update]:
    """Takes `epochs_per_batch` times a step on every mini-batch, in order; none on one without micro-batches.

    A step that is not finite is not taken, and ends the updates of this batch.

    Args:
        batches: this rank's micro-batches of each mini-batch.
        reference: of the KL term.
        rate: share of the peak learning rates.
        rollout: how they were drawn, where they may be truncated.

    Returns:
        The updates, at least one.
    """
    updates: list[Update] = []
    for _ in range(config.epochs_per_batch):
        for part in batches:
            shared: Any = {"reference": reference, "rate": rate, "rollout": rollout}
            updates.append(policy_step(trained, processor, optimizer, part, config, **shared))
            if updates[-1].optim["optim/skipped"]:
                return updates
    return updates


@torch.no_grad()
def with_old_logprobs(
    trained: TrainedModel, batches: Sequence[TrainBatch], allowed: AllowedIds, config: RlConfig
) -> list[TrainBatch]:
    """The batches with the log-probs of their trained tokens under the policy as it is, which wait where they do."""
    fused_head = fuses_head(trained.full, config)
    out: list[TrainBatch] = []
    for batch in aligned(batches, trained):
        moved = batch.to(trained.full.device)
        with trace.span("steps", "old log-probs", lengths=batch.lengths, rows=len(batch.rows), grids=batch.grids):
            logprobs = trained(trained_logprobs, moved, allowed, moved.temperatures, fused_head=fused_head)
        out.append(replace(batch, old_logprobs=logprobs.to(batch.weights.device)))
    return [replace(batch, old_logprobs=done.old_logprobs) for batch, done in zip(batches, out, strict=False)]


def with_ref_logprobs(
    reference: Model | TrainedModel,
    batches: Sequence[TrainBatch],
    allowed: AllowedIds,
    config: RlConfig,
    trained: TrainedModel,
) -> list[TrainBatch]:
    """The batches with the log-probs of their trained tokens under the reference, which no update changes.

    Args:
        trained: the policy, whose ranks do so together.
    """
    fused_head, device = fuses_head(trained.full, config), trained.full.device
    out: list[TrainBatch] = []
    for batch in aligned(batches, trained):
        logprobs = reference_logprobs(reference, batch.to(device), allowed, fused_head=fused_head)
        out.append(replace(batch, ref_logprobs=logprobs.to(batch.weights.device)))
    return [replace(batch, ref_logprobs=done.ref_logprobs) for batch, done in zip(batches, out, strict=False)]


def policy_step(
    trained: TrainedModel,
    processor: Processor,
    optimizer: Optimizer,
    batches: Sequence[TrainBatch],
    config: RlConfig,
    *,
    reference: Model | TrainedModel | None,
    rate: float,
    rollout: RolloutConfig | None = None,
) -> Update:
    """One optimizer step on the GRPO loss of micro-batches; none where there are none on any rank."""
    world, device, fused_head = trained.world, trained.full.device, fuses_head(trained.full, config)
    allowed, loss_config, collected = AllowedIds.of(processor, rollout), loss_of(config), LossMetrics()
    losses: list[Tensor] = []
    everyones = aligned(batches, trained)
    if reference is not None and config.epochs_per_batch > 1:  # `packed_batches` asked it; the empty ones need nothing
        everyones = [batch if len(batch.rows) else replace(batch, ref_logprobs=batch.weights) for batch in everyones]
    for packed in everyones:
        batch = packed.to(device)
        also_reference = reference is not None and batch.ref_logprobs is None
        work = {"lengths": batch.lengths, "rows": len(batch.rows), "grids": batch.grids, "reference": also_reference}
        with trace.span("steps", "forward", **work):
            loss, metrics = trained(
                rollout_loss, batch, allowed, loss_config, reference=reference, fused_head=fused_head
            )
        with trace.span("steps", "backward", **work):
            loss.backward()
        optimizer.add_up()
        losses.append(loss.detach())
        if len(batch.rows):
            collected.add(losses[-1], metrics)
    collected = collected.of_all_ranks(world)
    if not everyones:
        return Update(loss=collected, optim={"optim/grad_norm": 0.0, "optim/rate_share": rate, "optim/skipped": 0.0})
    (total,) = world.sum([float(torch.stack(losses).sum())])
    with trace.span("steps", "optimizer"):
        stepped = step_metrics(optimizer, rate, total)
    return Update(loss=collected, optim=stepped, suspects=suspects(stepped, batches, losses, world))


def update_metrics(updates: Sequence[Update]) -> Metrics:
    """The metrics of a batch's updates: of the loss as one, means of the rest, and how many were taken.

    "optim/skipped" is 1 where the last one was not finite, so that it was not taken and no other after it.
    """
    trained = [update for update in updates if update.loss] or updates[:1]
    out = LossMetrics.together([update.loss for update in trained])
    for name in updates[0].optim:
        out[name] = float(np.mean([update.optim[name] for update in trained]))
    out["optim/skipped"] = updates[-1].optim["optim/skipped"]
    out["optim/updates"] = float(sum(bool(update.loss) for update in updates) - out["optim/skipped"])
    return out


def loss_of(config: RlConfig) -> GrpoLossConfig:
    """The loss that the table `rl.loss`, `rl.kl_coef` and `rl.greedy_tokens` say."""
    return GrpoLossConfig(kl_coef=config.kl_coef, greedy_tokens=config.greedy_tokens, **asdict(config.loss))
