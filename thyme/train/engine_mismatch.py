"""What an engine in fp8 costs: its log-probs of what it drew, against those of the model that training has."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.types import Rollout
from thyme.train.mismatch import divergence_sums, mean_divergence
from thyme.train.objective import AllowedIds, trained_logprobs
from thyme.train.packing import pack
from thyme.train.policy_samples import rollout_sample

_MAX_TOKENS = 4096
"""Of a forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMismatch:
    """Over all drawn tokens."""

    tokens: int
    kl: float
    """mismatch/kl as a training step has it: from engine to trainer, in nats a token."""
    mean: float
    """|difference of log-probs|, in nats."""
    largest: float

    def __str__(self) -> str:
        return (
            f"mismatch of the engine with the model as it is trained: kl {self.kl:.3g} nats a token, |dlogp| mean "
            f"{self.mean:.3g}, largest {self.largest:.3g}, over {self.tokens:,} tokens"
        )


@torch.no_grad()
def engine_mismatch(
    model: Model, processor: Processor, rollouts: Iterable[Rollout], config: RolloutConfig | None = None
) -> EngineMismatch | None:
    """Scores rollouts anew, as a training step does before its update; None where nothing was drawn.

    Args:
        model: with the weights that the engine had.
        config: how they were drawn, where they may be truncated.
    """
    samples = [rollout_sample(processor, rollout, 0.0) for rollout in rollouts]
    allowed, sums, differences = AllowedIds.of(processor, config), [], []
    for batch in pack(samples, image_token_id=processor.image_token_id, max_tokens=_MAX_TOKENS):
        moved = batch.to(model.device)
        logprobs = trained_logprobs(model, moved, allowed, moved.temperatures, fused_head=False)
        scored = replace(batch, old_logprobs=logprobs.to(batch.weights.device))
        assert scored.old_logprobs is not None and scored.rollout_logprobs is not None
        sums.append(divergence_sums(scored, {}))
        differences.append((scored.old_logprobs - scored.rollout_logprobs).abs())
    if not differences:
        return None
    every = torch.cat(differences)
    kl = mean_divergence(sums)["mismatch/kl"]
    return EngineMismatch(tokens=len(every), kl=kl, mean=float(every.mean()), largest=float(every.max()))
