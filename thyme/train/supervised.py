"""The step that base stage, SFT and annealing share: samples in, one optimizer step, metrics out."""

from collections.abc import Sequence

import torch

from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, normalize, supervised_loss
from thyme.train.optim import Optimizer
from thyme.train.packing import Sample, pack


def supervised_step(
    model: Model,
    processor: Processor,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    *,
    rate: float,
    max_tokens: int,
    fused_head: bool = False,
) -> Metrics:
    """One optimizer step on the mean negative log-probability of all trained tokens of `samples`.

    Args:
        rate: share of the peak learning rates.
        max_tokens: packed tokens in a micro-batch.
        fused_head: see `StageConfig`.
    """
    allowed = AllowedIds.of(processor)
    batches = pack(normalize([samples], "batch_tokens"), image_token_id=processor.image_token_id, max_tokens=max_tokens)
    loss = torch.zeros((), device=model.device)
    for batch in batches:
        micro_loss = supervised_loss(model, batch.to(model.device), allowed, fused_head=fused_head)
        micro_loss.backward()
        loss += micro_loss.detach()
    grad_norm = optimizer.step(rate)
    return {
        "loss": float(loss),
        "optim/grad_norm": grad_norm,
        "optim/rate_share": rate,
        "batch/tokens": float(sum(sum(batch.lengths) for batch in batches)),
        "batch/trained_tokens": float(sum(len(batch.rows) for batch in batches)),
    }
