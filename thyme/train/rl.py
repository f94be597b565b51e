"""GRPO-ATS: rollouts of the current policy, rewards, group advantages, one on-policy step, and again.

The temperature switch happens in the engine; here it is only known per token. Engine and trainer hold one module, so
the optimizer's step is the weight update and the engine merely forgets what it cached.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from thyme.data.streams import Stream
from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.rewards import Scorer
from thyme.rollout.records import write_rollouts
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.types import Question, Rollout, TokenKind
from thyme.train.advantages import group_advantages, zero_spread
from thyme.train.config import RlConfig
from thyme.train.group_scores import GroupScores, ScoredGroup
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, normalize, rollout_loss
from thyme.train.optim import Optimizer, build_optimizer, rate_share
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.rl_metrics import Laps, LossMetrics, reward_metrics, rollout_metrics
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
    scorer: Scorer,
    seed: int = 0,
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    """Trains `model` in place by GRPO on the loop's rollouts.

    Args:
        model: the engine's own; as it comes in it is the KL term's reference, so a resumed run gets the first one's.
        loop: its config says group size, temperatures and limits.
        questions: the stream; `thyme.data.streams.endless` makes one of a finite data set.
        scorer: is given each group when its last rollout ends. A group it cannot score is left out of the step and
            counted as reward/groups_failed; a step without any scored group changes nothing.
        seed: of the rollouts' sampling.
        options: see `thyme.train.stage.StageOptions`; with a run_dir the rollouts are recorded too.

    Returns:
        The metrics of every step.

    Raises:
        ValueError: the loop's engine runs another module; no group could be scored in `config.max_unscored_steps`
            steps in a row.
    """
    _check(loop, model)
    reference = frozen_copy(model) if config.kl_coef > 0 else None
    same_bits = loop.engine.config.deterministic and model.device.type == "cpu"
    with frozen_vision(model, config.freeze_vision):
        optimizer = build_optimizer(model, config)
        stage = Stage("rl", model, processor, optimizer, config, **options)
        run_dir = options.get("run_dir")
        if options.get("resume_from") is not None:
            loop.engine.weights_updated()
        with stage:
            while stage.step < config.steps and not stage.stopped:
                laps = Laps()
                batch = questions(stage.step * config.batch_size, config.batch_size)
                sampling = loop.config.sampling(seed=seed * 1_000_003 + stage.step)
                scores = GroupScores(scorer, sampling.n)
                rollouts = loop.run(batch, sampling, on_end=scores.ended)
                laps.end("rollout")
                sampled = rollout_metrics(
                    rollouts, rollout_s=laps.seconds["rollout"], weight_version=loop.engine.weight_version
                )
                groups = scores.collect(rollouts)
                laps.end("reward")
                samples = policy_samples(processor, groups, config)
                rate = rate_share(config, stage.step, config.steps)
                updated, unfit = policy_step(
                    model, processor, optimizer, samples, config, reference=reference, rate=rate, same_bits=same_bits
                )
                laps.end("train")
                loop.engine.weights_updated()
                laps.end("sync")
                if run_dir is not None and config.record_steps and stage.step % config.record_steps == 0:
                    record(run_dir / "rollouts" / f"step_{stage.step}.jsonl", groups)
                _remember_unscored(stage, groups)
                stage.end_step(sampled | reward_metrics(groups) | updated | laps.metrics(), unfit)
                if stage.memory["unscored"] >= config.max_unscored_steps:
                    raise ValueError(
                        f"rl step {stage.step}: none of {len(groups)} groups could be scored; that is "
                        f"{stage.memory['unscored']} steps in a row, so the judge is not there (the log says what it "
                        "answered): mend it and resume"
                    )
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


def _remember_unscored(stage: Stage, groups: Sequence[ScoredGroup]) -> None:
    """Counts the steps in a row of which no group was scored, across a resume too."""
    is_unscored = all(group.rewards is None for group in groups)
    stage.memory["unscored"] = stage.memory.get("unscored", 0) + 1 if is_unscored else 0


def policy_samples(processor: Processor, groups: Sequence[ScoredGroup], config: RlConfig) -> list[Sample]:
    """What can be learned from: the rollouts of every group whose rewards differ.

    A group without spread has advantage 0, so its forward pass is saved (its KL term goes with it); its tokens still
    count in the denominators. A group without rewards is as if it had not been asked.
    """
    scored = [group for group in groups if group.rewards is not None]
    if not scored:
        return []
    rewards = torch.tensor([[reward.total for reward in group.rewards or ()] for group in scored])
    advantages = group_advantages(rewards, config.advantage_scale).tolist()
    samples = normalize(
        [
            [
                rollout_sample(processor, rollout, advantage)
                for rollout, advantage in zip(group.rollouts, row, strict=True)
            ]
            for group, row in zip(scored, advantages, strict=True)
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
    model: Model,
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
    loss_config = loss_of(config)
    allowed = AllowedIds.of(processor)
    collected = LossMetrics()
    batches: list[TrainBatch] = pack(
        samples, image_token_id=processor.image_token_id, max_tokens=config.max_tokens_per_micro_batch
    )
    losses: list[Tensor] = []
    for packed in batches:
        batch = replace(packed, same_bits=same_bits).to(model.device)
        loss, metrics = rollout_loss(
            model, batch, allowed, loss_config, reference=reference, fused_head=config.fused_head
        )
        loss.backward()
        optimizer.add_up()
        losses.append(loss.detach())
        collected.add(losses[-1], metrics)
    if not batches:
        return collected.metrics() | {"optim/grad_norm": 0.0, "optim/rate_share": rate, "optim/skipped": 0.0}, ()
    stepped = step_metrics(optimizer, rate, float(torch.stack(losses).sum()))
    return collected.metrics() | stepped, suspects(stepped, batches, losses)


def loss_of(config: RlConfig) -> GrpoLossConfig:
    """The loss that the table `rl.loss`, `rl.kl_coef` and `rl.greedy_tokens` say."""
    return GrpoLossConfig(kl_coef=config.kl_coef, greedy_tokens=config.greedy_tokens, **asdict(config.loss))


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


def record(path: Path, groups: Sequence[ScoredGroup]) -> None:
    """Writes the rollouts of a step with their rewards; null where a group could not be scored."""
    rollouts: list[Rollout] = []
    rewards: list[dict[str, Any] | None] = []
    for group in groups:
        rollouts += group.rollouts
        rewards += [None] * len(group.rollouts) if group.rewards is None else map(asdict, group.rewards)
    write_rollouts(path, rollouts, rewards)
