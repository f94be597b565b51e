"""From scored rollouts to what the policy loss trains on: advantages, denominators, mini-batches of questions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from thyme.model.processor import Processor
from thyme.rollout.types import Rollout, TokenKind
from thyme.train.advantages import Credit, branch_advantages, group_advantages, zero_spread
from thyme.train.config import RlConfig
from thyme.train.group_scores import TRUNCATED, ScoredGroup
from thyme.train.objective import normalize
from thyme.train.packing import Sample
from thyme.train.tokenization import positions


def mini_batches(processor: Processor, groups: Sequence[ScoredGroup], config: RlConfig) -> list[list[Sample]]:
    """The samples of each update of an epoch: the scored groups in order, cut into `updates_per_batch` parts.

    Parts differ by one group at most, the larger first. Each is normalised by itself, as a batch of its own; one
    whose groups have no spread is empty.
    """
    scored = [group for group in groups if group.rewards is not None]
    size, larger = divmod(len(scored), config.updates_per_batch)
    starts = [part * size + min(part, larger) for part in range(config.updates_per_batch + 1)]
    return [policy_samples(processor, scored[start:end], config) for start, end in pairwise(starts)]


def policy_samples(processor: Processor, groups: Sequence[ScoredGroup], config: RlConfig) -> list[Sample]:
    """What can be learned from: the rollouts of every group whose rewards differ.

    A group without spread has advantage 0, so its forward pass is saved (its KL term goes with it); its tokens still
    count in the denominators. A group without rewards is as if it had not been asked. A rollout that
    `config.truncated` masks counts in its group's baseline and nowhere else. Under `config.credit` "branch" a token's
    advantage is among the siblings of its branch point, and a rollout is kept where some token has one.
    """
    scored = [group for group in groups if group.rewards is not None]
    if not scored:
        return []
    rewards = torch.tensor([group.totals(config.truncated) for group in scored])
    if config.credit == "branch" and any(rollout.parent for group in scored for rollout in group.rollouts):
        return _by_branch(processor, scored, config)
    advantages = group_advantages(rewards, config.advantage_scale).tolist()
    samples = normalize(
        [
            [
                replace(
                    rollout_sample(processor, rollout, advantage, is_trained=_is_trained(rollout, config)),
                    rank=group.rank,
                    group=number,
                )
                for rollout, advantage in zip(group.rollouts, row, strict=True)
            ]
            for number, (group, row) in enumerate(zip(scored, advantages, strict=True))
        ],
        config.normalization,
        constant=config.normalization_tokens,
    )
    has_spread = (~zero_spread(rewards)).repeat_interleave(rewards.shape[1]).tolist()
    return [sample for sample, keep in zip(samples, has_spread, strict=True) if keep]


def _by_branch(processor: Processor, groups: Sequence[ScoredGroup], config: RlConfig) -> list[Sample]:
    """As `policy_samples`, each token with the advantage of its branch, and only in the rollout that drew it."""
    samples: list[list[Sample]] = []
    for group in groups:
        parents = [None if r.parent is None else (r.parent.index, r.parent.round) for r in group.rollouts]
        credits = branch_advantages(group.totals(config.truncated), parents, config.advantage_scale)
        samples.append(
            [
                replace(_credited(processor, rollout, of, config), rank=group.rank)
                for rollout, of in zip(group.rollouts, credits, strict=True)
            ]
        )
    normalized = normalize(samples, config.normalization, constant=config.normalization_tokens)
    return [
        sample for sample in normalized if sample.advantages is not None and (sample.advantages * sample.weights).any()
    ]


def _credited(processor: Processor, rollout: Rollout, credits: Sequence[Credit], config: RlConfig) -> Sample:
    sample = rollout_sample(processor, rollout, 0.0, is_trained=_is_trained(rollout, config))
    starts = np.array([credit.round for credit in credits])
    which = np.searchsorted(starts, rollout.rounds, side="right") - 1  # -1 before the first
    advantages = np.array([credit.advantage for credit in credits], dtype=np.float32)[which]
    return replace(sample, advantages=advantages, weights=sample.weights * (which >= 0))


def _is_trained(rollout: Rollout, config: RlConfig) -> bool:
    return config.truncated != "mask" or rollout.status not in TRUNCATED


def rollout_sample(processor: Processor, rollout: Rollout, advantage: float, *, is_trained: bool = True) -> Sample:
    """A rollout as it was sampled, token for token; trained is what the policy drew, or nothing."""
    greedy = rollout.temperatures == 0
    return Sample(
        token_ids=rollout.token_ids,
        positions=positions(processor, rollout.token_ids, rollout.images),
        weights=rollout.sampled.astype(np.float32) * is_trained,
        images=tuple(rollout.images),
        advantages=np.full(len(rollout.token_ids), advantage, dtype=np.float32),
        temperatures=rollout.temperatures,
        rollout_logprobs=np.where(greedy, rollout.logprobs_raw, rollout.logprobs),
        segments=(rollout.kinds == TokenKind.CODE).astype(np.uint8),
        phases=rollout.phases,
        name=f"{rollout.question.id}/{rollout.index}",
    )
