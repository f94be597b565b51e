"""The step that base stage, SFT and annealing share: samples in, one optimizer step, metrics out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thyme import trace
from thyme.model.processor import Processor
from thyme.train.balance import aligned
from thyme.train.distributed import World
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, normalize, supervised_losses
from thyme.train.optim import Optimizer
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.reward_metrics import MOST_SOURCES, metric_name
from thyme.train.sharding import TrainedModel


def supervised_step(
    trained: TrainedModel,
    processor: Processor,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    *,
    rate: float,
    max_tokens: int,
    fused_head: bool = False,
) -> tuple[Metrics, tuple[str, ...]]:
    """One optimizer step on the mean negative log-probability of all trained tokens of the global batch.

    Args:
        trained: the model; its world's ranks all take this step together.
        samples: this rank's share of the global batch; all of it on one process.
        rate: share of the peak learning rates.
        max_tokens: packed tokens in a micro-batch.
        fused_head: see `StageConfig`.

    Returns:
        The metrics, and the names of the samples that may be why no step was taken, where none was: both of the global
        batch, the same on every rank.
    """
    world, device = trained.world, trained.full.device
    allowed = AllowedIds.of(processor)
    with trace.span("steps", "pack"):
        normalized = normalize([samples], "batch_tokens", world=world)
        batches = pack(normalized, image_token_id=processor.image_token_id, max_tokens=max_tokens)
    losses: list[Tensor] = []
    token_losses: list[Tensor] = []
    for batch in aligned(batches, trained):
        work = {"lengths": batch.lengths, "rows": len(batch.rows), "grids": batch.grids}
        with trace.span("steps", "forward", **work):
            of_tokens = trained(supervised_losses, batch.to(device), allowed, fused_head=fused_head)
            micro_loss = of_tokens.sum()
        with trace.span("steps", "backward", **work):
            micro_loss.backward()
        optimizer.add_up()
        losses.append(micro_loss.detach())
        token_losses.append(of_tokens.detach())
    with trace.span("steps", "read the loss"):
        loss, tokens, trained_tokens = world.sum(
            [
                float(sum(losses, start=torch.zeros((), device=device))),
                sum(sum(batch.lengths) for batch in batches),
                sum(len(batch.rows) for batch in batches),
            ]
        )
    with trace.span("steps", "optimizer"):
        metrics = step_metrics(optimizer, rate, loss)
    metrics |= {"loss": loss, "batch/tokens": tokens, "batch/trained_tokens": trained_tokens}
    return metrics | source_losses(batches, token_losses, world), suspects(metrics, batches, losses, world)


def source_losses(batches: Sequence[TrainBatch], losses: Sequence[Tensor], world: World) -> Metrics:
    """loss/source/<name>, the mean over the trained tokens of each source; nothing where all rows have one source.

    Sources are named in alphabetical order; those of a step beyond the first MOST_SOURCES come together as "other".

    Args:
        batches: this rank's.
        losses: [N] of each, and perhaps of those that were added after them.
        world: whose ranks took the step.
    """
    sums: dict[str, tuple[float, float]] = {}
    for batch, of_tokens in zip(batches, losses, strict=False):
        ends = batch.cu_seqlens.tolist()
        lost, weighed = of_tokens.tolist(), batch.weights.tolist()
        for source, start, end in zip(batch.sources, ends, ends[1:], strict=False):
            loss, weight = sums.get(source, (0.0, 0.0))
            sums[source] = loss + sum(lost[start:end]), weight + sum(weighed[start:end])
    gathered = world.gather(sums)
    names = sorted({source for rank in gathered for source in rank})
    if len(names) < 2:
        return {}
    totals: dict[str, tuple[float, float]] = {}
    for source, (loss, weight) in (item for rank in gathered for item in rank.items()):
        name = metric_name(source or "unnamed") if source in names[:MOST_SOURCES] else "other"
        before = totals.get(name, (0.0, 0.0))
        totals[name] = before[0] + loss, before[1] + weight
    return {f"loss/source/{name}": loss / weight for name, (loss, weight) in totals.items() if weight}


def step_metrics(optimizer: Optimizer, rate: float, loss: float) -> Metrics:
    """Steps on the gradients of `loss` at `rate` of the peak rates, and says how that went."""
    norm = optimizer.step(rate, loss)
    skipped = not (math.isfinite(norm) and math.isfinite(loss))
    return {"optim/grad_norm": norm, "optim/rate_share": rate, "optim/skipped": float(skipped)}


def suspects(
    metrics: Metrics, batches: Sequence[TrainBatch], losses: Sequence[Tensor], world: World | None = None
) -> tuple[str, ...]:
    """Samples of the micro-batches whose loss is not finite, on any rank; of all where only the gradient is not; ()
    after a step.

    Args:
        metrics: of the step, the same on every rank.
        batches: this rank's, without those that `aligned` added.
        losses: of these, and perhaps of those that were added after them.
        world: whose ranks took the step.
    """
    if not metrics["optim/skipped"]:
        return ()
    named = [(batch.names, bool(loss.isfinite())) for batch, loss in zip(batches, losses, strict=False)]
    gathered = [named] if world is None else world.gather(named)
    everywhere = [entry for rank in gathered for entry in rank]
    blamed = [names for names, is_finite in everywhere if not is_finite] or [names for names, _ in everywhere]
    return tuple(name for names in blamed for name in names)
