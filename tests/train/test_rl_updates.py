"""Several updates on a batch: against which policy the ratio is, what the second one's loss is, how a batch is cut."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.rl_material import ROLLOUT, by_index, group_of, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model import Model, Processor, build
from thyme.model.attention import PackedAttention
from thyme.rewards import RuleScorer
from thyme.rollout.types import Question
from thyme.sandbox import Sandbox
from thyme.toy.model import tiny_config
from thyme.train.config import LossConfig, RlConfig
from thyme.train.group_scores import ScoredGroup
from thyme.train.objective import AllowedIds, reference_logprobs, rollout_loss
from thyme.train.optim import build_optimizer
from thyme.train.packing import Sample, pack
from thyme.train.policy_samples import mini_batches, policy_samples
from thyme.train.policy_update import (
    Update,
    loss_of,
    packed_batches,
    update_metrics,
    update_policy,
    with_old_logprobs,
)
from thyme.train.rl import train_rl
from thyme.train.sharding import TrainedModel

RL = RlConfig(batch_size=2, learning_rate=3e-3, warmup_steps=0)


@pytest.fixture(scope="module")
def groups(taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]) -> list[ScoredGroup]:
    """Two questions, two rollouts each: text at temperature 0.8, code at 0."""
    rollouts = make_loop(taught, sandbox).run(asked, replace(ROLLOUT, temperature=0.8).sampling(seed=1))
    temperatures = [set(r.temperatures[r.sampled].tolist()) for group in rollouts for r in group]
    assert set().union(*temperatures) == {0.0, np.float32(0.8)}
    return [group_of(*group, totals=(0.0, 1.0)) for group in rollouts]


def updated(
    model: Model, processor: Processor, groups: Sequence[ScoredGroup], config: RlConfig, reference: Model | None = None
) -> list[Update]:
    """The updates of a model that is changed by them."""
    samples = mini_batches(processor, groups, config)
    trained = TrainedModel(model)
    batches, _ = packed_batches(trained, processor, samples, config, reference=reference, same_bits=False)
    optimizer = build_optimizer(model, config)
    return update_policy(trained, processor, optimizer, batches, config, reference=reference, rate=1.0)


def token_logprobs64(model: Model, processor: Processor, sample: Sample) -> torch.Tensor:
    """[T] of one sequence by itself in float64: at each token's temperature, 1 where greedy; 0 where not trained."""
    allowed = AllowedIds.of(processor)
    (batch,) = pack([sample], image_token_id=processor.image_token_id)
    double = copy.deepcopy(model).double()
    features = None
    if batch.pixel_values is not None:
        features = double.encode_images(batch.pixel_values.double(), batch.grids)
    with torch.no_grad():
        hidden = double(
            batch.input_ids,
            batch.positions,
            PackedAttention(batch.lengths),
            image_features=features,
            image_positions=batch.image_positions,
        )
        logits = (hidden @ double.lm_head_weight.T)[:, : allowed.size]
    logits[:, list(allowed.banned_ids)] = -torch.inf
    out = torch.zeros(len(sample.token_ids), dtype=torch.float64)
    assert sample.temperatures is not None
    for t in sample.weights.nonzero()[0]:
        temperature = float(sample.temperatures[t]) or 1.0
        out[t] = torch.log_softmax(logits[t - 1] / temperature, dim=0)[sample.token_ids[t]]
    return out


def test_the_ratio_is_one_at_the_first_update_and_not_after(
    taught: Model, processor: Processor, groups: list[ScoredGroup]
) -> None:
    first, second, third = updated(copy.deepcopy(taught), processor, groups, replace(RL, epochs_per_batch=3))
    assert first.loss.metrics()["actor/ratio"] == first.loss.metrics()["actor/ratio_max"] == 1.0
    for later in (second, third):
        assert later.loss.metrics()["actor/ratio_max"] > 1.0
    one, two = updated(copy.deepcopy(taught), processor, groups, replace(RL, updates_per_batch=2))
    assert one.loss.metrics()["actor/ratio_max"] == 1.0
    assert two.loss.metrics()["actor/ratio"] != 1.0  # another question, but the model has moved


def test_one_update_computes_no_old_log_probs_and_they_would_change_no_bit(
    taught: Model, processor: Processor, groups: list[ScoredGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []
    from thyme.train import policy_update

    monkeypatch.setattr(policy_update, "with_old_logprobs", lambda *a: asked_for.append(a) or with_old_logprobs(*a))
    updated(copy.deepcopy(taught), processor, groups, RL)
    assert not asked_for
    updated(copy.deepcopy(taught), processor, groups, replace(RL, updates_per_batch=2))
    assert len(asked_for) == 2
    (batch,) = pack(policy_samples(processor, groups, RL), image_token_id=processor.image_token_id)
    allowed = AllowedIds.of(processor)
    results = []
    for packed in (batch, *with_old_logprobs(TrainedModel(taught), [batch], allowed, RL)):
        taught.zero_grad()
        loss, _ = rollout_loss(taught, packed, allowed, loss_of(RL))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in taught.parameters() if p.grad is not None)])
    taught.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_is_asked_once_a_batch(
    taught: Model, processor: Processor, groups: list[ScoredGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many epochs; and its log-probs are those that each update would have computed."""
    from thyme.train import objective, policy_update

    asked_for: list[torch.Tensor] = []

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        asked_for.append(reference_logprobs(*args, **options))
        return asked_for[-1]

    for module in (objective, policy_update):
        monkeypatch.setattr(module, "reference_logprobs", counted)
    reference = build(tiny_config(), processor, seed=1)
    losses = {}
    for epochs in (1, 3):
        config = replace(RL, epochs_per_batch=epochs, kl_coef=0.1)
        updates = updated(copy.deepcopy(taught), processor, groups, config, reference)
        losses[epochs] = updates[0].loss.metrics()["loss"]
    assert len(asked_for) == 2 and torch.equal(*asked_for)
    assert losses[1] == losses[3]


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("max_tokens", [16_384, 1], ids=["one_pack", "one_each"])
def test_the_second_update_has_the_loss_of_a_derivation_by_hand(
    taught: Model, processor: Processor, groups: list[ScoredGroup], fused_head: bool, max_tokens: int
) -> None:
    """Float64, every sequence alone: PPO's clipped ratio against the first policy, k3 to the reference."""
    reference = build(tiny_config(), processor, seed=1)
    config = replace(
        RL,
        epochs_per_batch=2,
        kl_coef=0.1,
        fused_head=fused_head,
        max_tokens_per_micro_batch=max_tokens,
        loss=LossConfig(clip_eps_low=0.1, clip_eps_high=0.15),
    )
    first, second = updated(copy.deepcopy(taught), processor, groups, config, reference)
    moved = copy.deepcopy(taught)
    (same,) = updated(moved, processor, groups, replace(config, epochs_per_batch=1), reference)
    assert same.loss.metrics()["loss"] == first.loss.metrics()["loss"]

    expected, clipped, tokens = 0.0, 0, 0
    for group in groups:
        plain = replace(config, normalization="constant", normalization_tokens=1)
        samples = policy_samples(processor, [group], plain)
        count = sum(int((sample.weights != 0).sum()) for sample in samples)
        for index, sample in enumerate(samples):
            advantage = (index - 0.5) / (0.5**0.5 + 1e-4)  # rewards 0 and 1
            old, new, ref = (token_logprobs64(m, processor, sample) for m in (taught, moved, reference))
            for t in sample.weights.nonzero()[0]:
                ratio = float((new[t] - old[t]).exp())
                policy = -min(ratio * advantage, min(max(ratio, 0.9), 1.15) * advantage)
                d = float(ref[t] - new[t])
                expected += (policy + 0.1 * (torch.tensor(d).exp().item() - d - 1)) / (count * len(groups))
                clipped += policy != -ratio * advantage
                tokens += 1
    metrics = second.loss.metrics()
    assert clipped > 0
    assert metrics["loss"] == pytest.approx(expected, rel=2e-5)
    assert metrics["actor/clip_frac_low"] + metrics["actor/clip_frac_high"] == pytest.approx(clipped / tokens)


def test_a_batch_is_cut_by_question_in_order(processor: Processor) -> None:
    whole = [group_of(*[hand_rollout((1.0,) * (2 + g))] * 2, totals=(0.0, 1.0)) for g in range(5)]
    unscored = ScoredGroup(rollouts=whole[0].rollouts, rewards=None)
    same = group_of(*whole[0].rollouts, totals=(1.0, 1.0))

    def cut(groups: list[ScoredGroup], updates: int) -> list[list[int]]:
        """The group of each sample, told by its length."""
        config = RlConfig(batch_size=5, updates_per_batch=updates)
        return [[len(s.token_ids) - 4 for s in part] for part in mini_batches(processor, groups, config)]

    assert cut(whole, 1) == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    assert cut(whole, 2) == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4]]
    assert cut(whole, 3) == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]
    assert cut([unscored, *whole[1:]], 2) == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert cut([same, same, *whole[1:3]], 2) == [[], [1, 1, 2, 2]]
    assert cut([unscored], 2) == [[], []]


def test_a_mini_batch_is_normalised_by_itself(processor: Processor) -> None:
    groups = [group_of(*[hand_rollout((1.0,) * 4)] * 2, totals=(0.0, 1.0)) for _ in range(4)]
    for updates, weight in ((1, 1 / 32), (2, 1 / 16), (4, 1 / 8)):
        config = RlConfig(batch_size=4, updates_per_batch=updates)
        parts = mini_batches(processor, groups, config)
        assert {float(s.weights.max()) for part in parts for s in part} == {weight}


def test_a_mini_batch_without_spread_takes_no_step(
    taught: Model, processor: Processor, groups: list[ScoredGroup]
) -> None:
    alike = group_of(*groups[0].rollouts, totals=(1.0, 1.0))
    config = replace(RL, updates_per_batch=2)
    updates = updated(copy.deepcopy(taught), processor, [alike, groups[1]], config)
    assert [bool(update.loss) for update in updates] == [False, True]
    metrics = update_metrics(updates)
    assert metrics["optim/updates"] == 1.0
    assert metrics["optim/grad_norm"] == updates[1].optim["optim/grad_norm"] > 0
    assert metrics["loss"] == updates[1].loss.metrics()["loss"]
    nothing = update_metrics(updated(copy.deepcopy(taught), processor, [alike, alike], config))
    assert nothing["optim/updates"] == nothing["optim/grad_norm"] == nothing["loss"] == 0.0


def test_an_update_that_is_not_finite_ends_those_of_its_batch(
    taught: Model, processor: Processor, groups: list[ScoredGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    from thyme.train import policy_update

    calls = []

    def spoiled(*args: object, **kwargs: object) -> object:
        loss, metrics = rollout_loss(*args, **kwargs)  # type: ignore[arg-type]
        calls.append(loss)
        return (loss * torch.nan if len(calls) == 2 else loss), metrics

    monkeypatch.setattr(policy_update, "rollout_loss", spoiled)
    model = copy.deepcopy(taught)
    updates = updated(model, processor, groups, replace(RL, epochs_per_batch=4))
    assert len(updates) == 2 and updates[1].suspects
    metrics = update_metrics(updates)
    assert metrics["optim/skipped"] == metrics["optim/updates"] == 1.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_of_several_updates(taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]) -> None:
    model = copy.deepcopy(taught)
    config = replace(RL, steps=2, updates_per_batch=2, epochs_per_batch=2, record_steps=0)
    history = train_rl(model, processor, make_loop(model, sandbox), endless(asked), config, scorer=RuleScorer(by_index))
    for metrics in history:
        assert metrics["optim/updates"] == 4.0 and metrics["actor/ratio_max"] > 1.0
        assert metrics["rollout/staleness_max"] == 0.0  # rollouts are of the policy before the first update
        assert metrics["mismatch/kl"] == 0.0  # and so are the log-probs that they are compared with


def test_more_parts_than_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"updates_per_batch: 3 must be at most batch_size \(2\)"):
        RlConfig(batch_size=2, updates_per_batch=3)
    for name in ("updates_per_batch", "epochs_per_batch"):
        with pytest.raises(ValueError, match=f"{name}: 0 must be at least 1"):
            RlConfig(**{name: 0})  # type: ignore[arg-type]
    assert loss_of(RlConfig()) == GrpoLossConfig()
