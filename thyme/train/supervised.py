"""The step that base stage, SFT and annealing share: samples in, one optimizer step, metrics out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, normalize, supervised_loss
from thyme.train.optim import Optimizer
from thyme.train.packing import Sample, TrainBatch, pack


def supervised_step(
    model: Model,
    processor: Processor,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    *,
    rate: float,
    max_tokens: int,
    fused_head: bool = False,
) -> tuple[Metrics, tuple[str, ...]]:
    """One optimizer step on the mean negative log-probability of all trained tokens of `samples`.

    Args:
        rate: share of the peak learning rates.
        max_tokens: packed tokens in a micro-batch.
        fused_head: see `StageConfig`.

    Returns:
        The metrics, and the names of the samples that may be why no step was taken, where none was.
    """
    allowed = AllowedIds.of(processor)
    batches = pack(normalize([samples], "batch_tokens"), image_token_id=processor.image_token_id, max_tokens=max_tokens)
    losses: list[Tensor] = []
    for batch in batches:
        micro_loss = supervised_loss(model, batch.to(model.device), allowed, fused_head=fused_head)
        micro_loss.backward()
        optimizer.add_up()
        losses.append(micro_loss.detach())
    loss = float(sum(losses, start=torch.zeros((), device=model.device)))
    metrics = step_metrics(optimizer, rate, loss)
    return metrics | {
        "loss": loss,
        "batch/tokens": float(sum(sum(batch.lengths) for batch in batches)),
        "batch/trained_tokens": float(sum(len(batch.rows) for batch in batches)),
    }, suspects(metrics, batches, losses)


def step_metrics(optimizer: Optimizer, rate: float, loss: float) -> Metrics:
    """Steps on the gradients of `loss` at `rate` of the peak rates, and says how that went."""
    norm = optimizer.step(rate, loss)
    skipped = not (math.isfinite(norm) and math.isfinite(loss))
    return {"optim/grad_norm": norm, "optim/rate_share": rate, "optim/skipped": float(skipped)}


def suspects(metrics: Metrics, batches: Sequence[TrainBatch], losses: Sequence[Tensor]) -> tuple[str, ...]:
    """Samples of the micro-batches whose loss is not finite; of all where only the gradient is not; () after a step."""
    if not metrics["optim/skipped"]:
        return ()
    blamed = [batch for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()] or batches
    return tuple(name for batch in blamed for name in batch.names)
