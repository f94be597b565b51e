"""GRPO-ATS: rollouts of the current policy, rewards, group advantages, one on-policy step, and again.

The temperature switch happens in the engine; here it is only known per token. Engine and trainer hold one module, so
the optimizer's step is the weight update and the engine merely forgets what it cached.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from thyme.data.streams import Stream
from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rewards import Reward, scored
from thyme.rollout.records import write_rollouts
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout, TokenKind
from thyme.train.advantages import group_advantages, zero_spread
from thyme.train.config import RlConfig
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, normalize, rollout_loss
from thyme.train.optim import Optimizer, build_optimizer, rate_share
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.rl_metrics import Laps, LossMetrics, reward_metrics, rollout_metrics
from thyme.train.sharding import TrainedModel, trained_model
from thyme.train.stage import Stage, StageOptions
from thyme.train.supervised import step_metrics, suspects
from thyme.train.tokenization import positions


def train_rl(
    model: Model,
    processor: Processor,
    loop: RolloutLoop,
    questions: Stream[Question],
    config: RlConfig,
    *,
    score: Callable[[Rollout], Reward],
    seed: int = 0,
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    """Trains `model` in place by GRPO on the loop's rollouts.

    Args:
        model: the engine's own; as it comes in it is the KL term's reference, so a resumed run gets the first one's.
        loop: its config says group size, temperatures and limits.
        questions: the stream; `thyme.data.streams.endless` makes one of a finite data set.
        score: the reward of one rollout; what it raises is 0, logged and counted as reward/errors.
        seed: of the rollouts' sampling.
        options: see `thyme.train.stage.StageOptions`; with a run_dir the rollouts are recorded too.

    Returns:
        The metrics of every step.

    Raises:
        ValueError: the loop's engine runs another module.
    """
    _check(loop, model)
    reference = frozen_copy(model) if config.kl_coef > 0 else None
    same_bits = loop.engine.config.deterministic and model.device.type == "cpu"
    with frozen_vision(model, config.freeze_vision):
        trained = trained_model(model, options.get("world"))
        optimizer = build_optimizer(trained.module, config)
        stage = Stage("rl", trained, processor, optimizer, config, **options)
        run_dir = options.get("run_dir")
        if options.get("resume_from") is not None:
            loop.engine.weights_updated()
        with stage:
            while stage.step < config.steps and not stage.stopped:
                laps = Laps()
                batch = questions(stage.step * config.batch_size, config.batch_size)
                groups = loop.run(batch, loop.config.sampling(seed=seed * 1_000_003 + stage.step))
                laps.end("rollout")
                sampled = rollout_metrics(
                    groups, rollout_s=laps.seconds["rollout"], weight_version=loop.engine.weight_version
                )
                rewards = [[scored(rollout, score) for rollout in group] for group in groups]
                laps.end("reward")
                totals = torch.tensor([[reward.total for reward in group] for group in rewards])
                samples = policy_samples(processor, groups, totals, config)
                rate = rate_share(config, stage.step, config.steps)
                updated, unfit = policy_step(
                    trained, processor, optimizer, samples, config, reference=reference, rate=rate, same_bits=same_bits
                )
                laps.end("train")
                loop.engine.weights_updated()
                laps.end("sync")
                if run_dir is not None and config.record_steps and stage.step % config.record_steps == 0:
                    record(run_dir / "rollouts" / f"step_{stage.step}.jsonl", groups, rewards)
                stage.end_step(sampled | reward_metrics(rewards) | updated | laps.metrics(), unfit)
    return stage.history


def _check(loop: RolloutLoop, model: Model) -> None:
    """Raises where the loop cannot train the model; warns where what it samples is biased."""
    if loop.engine.model is not model:
        raise ValueError("the rollout loop's engine holds another model: train the one it runs")
    if loop.config.biases_logprobs:
        warnings.warn(
            "rollout.top_k, top_p, min_p or repetition_penalty is on: rollouts are not drawn from the policy whose "
            "log-probs the loss uses, so its gradient is biased; turn them off for RL",
            stacklevel=3,
        )


def policy_samples(
    processor: Processor, groups: Sequence[Sequence[Rollout]], rewards: Tensor, config: RlConfig
) -> list[Sample]:
    """What can be learned from: the rollouts of every group whose rewards differ.

    A group without spread has advantage 0, so its forward pass is saved (its KL term goes with it); its tokens still
    count in the denominators.

    Args:
        rewards: [P, G].
    """
    advantages = group_advantages(rewards, config.advantage_scale).tolist()
    samples = normalize(
        [
            [rollout_sample(processor, rollout, advantage) for rollout, advantage in zip(group, row, strict=True)]
            for group, row in zip(groups, advantages, strict=True)
        ],
        config.normalization,
        constant=config.normalization_tokens,
    )
    has_spread = (~zero_spread(rewards)).repeat_interleave(rewards.shape[1]).tolist()
    return [sample for sample, keep in zip(samples, has_spread, strict=True) if keep]


def rollout_sample(processor: Processor, rollout: Rollout, advantage: float) -> Sample:
    """A rollout as it was sampled, token for token; trained is what the policy drew, and nothing else."""
    greedy = rollout.temperatures == 0
    return Sample(
        token_ids=rollout.token_ids,
        positions=positions(processor, rollout.token_ids, rollout.images),
        weights=rollout.sampled.astype(np.float32),
        images=tuple(rollout.images),
        advantages=np.full(len(rollout.token_ids), advantage, dtype=np.float32),
        temperatures=rollout.temperatures,
        rollout_logprobs=np.where(greedy, rollout.logprobs_raw, rollout.logprobs),
        segments=(rollout.kinds == TokenKind.CODE).astype(np.uint8),
        name=f"{rollout.question.id}/{rollout.index}",
    )


def policy_step(
    trained: TrainedModel,
    processor: Processor,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    config: RlConfig,
    *,
    reference: Model | None,
    rate: float,
    same_bits: bool,
) -> tuple[Metrics, tuple[str, ...]]:
    """One optimizer step on the GRPO loss of `samples`; none where there are none.

    Args:
        rate: share of the peak learning rates.
        same_bits: see `TrainBatch`.

    Returns:
        The metrics, and the names of the rollouts that may be why no step was taken, where none was.
    """
    loss_config = GrpoLossConfig(kl_coef=config.kl_coef, greedy_tokens=config.greedy_tokens)
    allowed = AllowedIds.of(processor)
    collected = LossMetrics()
    batches: list[TrainBatch] = pack(
        samples, image_token_id=processor.image_token_id, max_tokens=config.max_tokens_per_micro_batch
    )
    losses: list[Tensor] = []
    for packed in batches:
        batch = replace(packed, same_bits=same_bits).to(trained.full.device)
        loss, metrics = trained(
            rollout_loss, batch, allowed, loss_config, reference=reference, fused_head=config.fused_head
        )
        loss.backward()
        optimizer.add_up()
        losses.append(loss.detach())
        collected.add(losses[-1], metrics)
    if not batches:
        return collected.metrics() | {"optim/grad_norm": 0.0, "optim/rate_share": rate, "optim/skipped": 0.0}, ()
    stepped = step_metrics(optimizer, rate, float(torch.stack(losses).sum()))
    return collected.metrics() | stepped, suspects(stepped, batches, losses)


def frozen_copy(model: Model) -> Model:
    """A copy that is never trained: the reference policy."""
    processor, model.processor = model.processor, None  # the tokenizer need not be copied
    try:
        reference = copy.deepcopy(model)
    finally:
        model.processor = processor
    return reference.requires_grad_(False)


@contextmanager
def frozen_vision(model: Model, is_frozen: bool) -> Iterator[None]:
    """Keeps the vision tower but its merger from being trained, inside the block."""
    frozen = []
    if is_frozen and model.visual is not None:
        frozen = [p for part in (model.visual.patch_embed, model.visual.blocks) for p in part.parameters()]
        frozen = [p for p in frozen if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def record(path: Path, groups: Sequence[Sequence[Rollout]], rewards: Sequence[Sequence[Reward]]) -> None:
    """Writes the rollouts of a step with their rewards."""
    write_rollouts(
        path,
        [rollout for group in groups for rollout in group],
        [asdict(reward) for group in rewards for reward in group],
    )
