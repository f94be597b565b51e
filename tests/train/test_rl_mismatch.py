"""Where trainer and engine disagree: truncated and masked importance sampling, and how much each touched."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.rl_material import ROLLOUT, by_index, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import RuleScorer
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox
from thyme.train.config import LossConfig, MismatchConfig, RlConfig
from thyme.train.mismatch import (
    MismatchError,
    divergence_sums,
    mask_metrics,
    masked,
    mean_divergence,
    mismatch_in,
)
from thyme.train.optim import build_optimizer
from thyme.train.packing import TrainBatch, pack
from thyme.train.policy_samples import rollout_sample
from thyme.train.policy_update import packed_batches, update_policy
from thyme.train.rl import train_rl
from thyme.train.sharding import TrainedModel

RL = RlConfig(steps=1, batch_size=2, learning_rate=1e-3, record_steps=0, kl_coef=0.0)


def by_hand(processor: Processor, *log_ratios: list[float]) -> TrainBatch:
    """Sequences whose trained tokens have these logs of trainer over engine."""
    rollouts = [hand_rollout((1.0,) * len(ratios), index=i) for i, ratios in enumerate(log_ratios)]
    samples = [rollout_sample(processor, rollout, 1.0) for rollout in rollouts]
    (batch,) = pack(samples, image_token_id=processor.image_token_id)
    flat = torch.tensor([x for ratios in log_ratios for x in ratios])
    assert batch.rollout_logprobs is not None and len(flat) == len(batch.rollout_logprobs)
    return replace(batch, old_logprobs=batch.rollout_logprobs + flat)


def kept(batch: TrainBatch) -> list[int]:
    return (batch.weights != 0).int().tolist()


def test_tokens_are_masked_one_by_one(processor: Processor) -> None:
    log = np.log
    batch = by_hand(processor, [0.0, log(3)], [log(0.4), log(0.6), log(1.9)])
    out, found = masked(batch, MismatchConfig(mask="token", low=0.5, high=2.0))
    assert kept(out) == [1, 0, 0, 1, 1]
    assert set(out.weights.tolist()) == {0.0, 1.0}
    assert mask_metrics([found]) == {"mismatch/masked_tokens": 2 / 5, "mismatch/masked_rollouts": 1.0}


def test_a_rollout_is_masked_by_the_geometric_mean_of_its_tokens(processor: Processor) -> None:
    log = np.log
    # 3 x 1/3 is 1, and 1 x 6 is 2.45 a token; neither token of the first would stay by itself.
    batch = by_hand(processor, [log(3), -log(3)], [0.0, log(6)], [log(0.6)] * 3)
    out, found = masked(batch, MismatchConfig(mask="sequence", low=0.5, high=2.0))
    assert kept(out) == [1, 1, 0, 0, 1, 1, 1]
    assert mask_metrics([found]) == {"mismatch/masked_tokens": 2 / 7, "mismatch/masked_rollouts": 1 / 3}


def test_what_is_no_number_is_left_out(processor: Processor) -> None:
    batch = by_hand(processor, [float("nan"), 0.0], [float("inf"), -float("inf")])
    assert kept(masked(batch, MismatchConfig(mask="token", low=0.0, high=2.0))[0]) == [0, 1, 0, 1]
    few = masked(batch, MismatchConfig(mask="token", low=0.5, high=2.0))[0]
    assert kept(few) == [0, 1, 0, 0] and few.num_weighted == 1


def test_metrics_are_over_all_micro_batches(processor: Processor) -> None:
    parts = [masked(by_hand(processor, ratios), MismatchConfig(mask="token"))[1] for ratios in ([0.0], [9.0, 0.0, 0.0])]
    assert mask_metrics(parts) == {"mismatch/masked_tokens": 1 / 4, "mismatch/masked_rollouts": 1 / 2}
    assert mask_metrics([]) == {}


def lie(rollout: Rollout, by: float, tokens: slice = slice(None)) -> Rollout:
    """The rollout as an engine would have recorded it whose log-probs are off by so much."""
    wrong = np.flatnonzero(rollout.sampled)[tokens]
    changed = {}
    for name in ("logprobs", "logprobs_raw"):
        array = getattr(rollout, name).copy()
        array[wrong] += by
        changed[name] = array
    return replace(rollout, **changed)


@pytest.mark.parametrize(("unit", "tokens"), [("token", slice(0, 3)), ("sequence", slice(None))])
def test_the_step_is_the_one_without_what_is_masked(
    unit: Any, tokens: slice, taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    (group,) = make_loop(taught, sandbox).run(asked[:1], ROLLOUT.sampling(seed=1))
    bad = [group[0], lie(group[1], 3.0, tokens)]

    def stepped(rollouts: list[Rollout], mask: Any, *, by_weight: bool) -> tuple[Model, dict[str, float]]:
        model, config = copy.deepcopy(taught), replace(RL, mismatch=MismatchConfig(mask=mask))
        samples = [rollout_sample(processor, rollout, a) for rollout, a in zip(rollouts, (-1.0, 1.0), strict=True)]
        if by_weight:
            weights = samples[1].weights.copy()
            weights[np.flatnonzero(group[1].sampled)[tokens]] = 0
            samples[1] = replace(samples[1], weights=weights)
        trained = TrainedModel(model)
        batches, metrics = packed_batches(trained, processor, [samples], config, reference=None, same_bits=True)
        update_policy(trained, processor, build_optimizer(model, config), batches, config, reference=None, rate=1.0)
        return model, metrics

    expected, nothing = stepped(group, "none", by_weight=True)
    found, metrics = stepped(bad, unit, by_weight=False)
    plain, _ = stepped(bad, "none", by_weight=False)
    assert not [name for name in nothing if name.startswith("mismatch/")]
    assert metrics["mismatch/masked_rollouts"] == 0.5 and 0 < metrics["mismatch/masked_tokens"] < 1
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(found.parameters(), plain.parameters(), strict=True))


def run(
    model: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], config: RlConfig, by: float
) -> tuple[Model, dict[str, float]]:
    """One step on rollouts whose recorded log-probs are all off by so much."""
    model = copy.deepcopy(model)
    loop = make_loop(model, sandbox)
    honest = loop.run
    loop.run = lambda *a, **k: [[lie(r, by) for r in group] for group in honest(*a, **k)]  # type: ignore[method-assign]
    (metrics,) = train_rl(model, processor, loop, endless(asked), config, scorer=RuleScorer(by_index))
    return model, metrics


def test_an_engine_that_agrees_is_not_masked(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    """The tightest mask and the plain step give the same bits: on this path the ratio is exactly 1."""
    tight = replace(RL, mismatch=MismatchConfig(mask="token", low=1.0, high=1.0))
    masked_model, metrics = run(taught, processor, sandbox, asked, tight, by=0.0)
    plain, _ = run(taught, processor, sandbox, asked, RL, by=0.0)
    assert metrics["mismatch/masked_tokens"] == metrics["mismatch/masked_rollouts"] == 0.0
    assert all(torch.equal(p, q) for p, q in zip(masked_model.parameters(), plain.parameters(), strict=True))


def test_an_engine_that_is_far_off_teaches_nothing(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    model, metrics = run(
        taught, processor, sandbox, asked, replace(RL, mismatch=MismatchConfig(mask="sequence")), by=1.0
    )
    assert metrics["mismatch/masked_tokens"] == metrics["mismatch/masked_rollouts"] == 1.0
    assert metrics["optim/updates"] == 0.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), taught.parameters(), strict=True))


def test_truncated_weights_and_how_many_were_truncated(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    """All ratios are e or 1 / e: capped at 2, or weighing what they are."""
    losses = {}
    for by in (-1.0, 0.0, 1.0):
        config = replace(RL, loss=LossConfig(rollout_ratio_cap=2.0))
        _, metrics = run(taught, processor, sandbox, asked, config, by)
        assert metrics["mismatch/capped_frac"] == (1.0 if by < 0 else 0.0)
        losses[by] = metrics["optim/grad_norm"]
    assert losses[-1.0] == pytest.approx(2 * losses[0.0], rel=1e-4)
    assert losses[1.0] == pytest.approx(losses[0.0] / np.e, rel=1e-4)
    _, metrics = run(taught, processor, sandbox, asked, RL, 1.0)
    assert metrics["optim/grad_norm"] == pytest.approx(losses[0.0], rel=1e-4)
    assert "mismatch/capped_frac" not in metrics and metrics["mismatch/kl"] > 0.1


def test_the_divergence_is_told_by_segment(processor: Processor) -> None:
    batch = by_hand(processor, [0.0, 1.0], [0.5, -1.0, 0.0])
    batch = replace(batch, segments=torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8))

    def k3(*log_ratios: float) -> float:
        return float(np.mean([np.expm1(x) - x for x in log_ratios]))

    expected = {
        "mismatch/kl": k3(0.0, 1.0, 0.5, -1.0, 0.0),
        "mismatch/kl_text": k3(0.0, 1.0),
        "mismatch/kl_code": k3(0.5, -1.0, 0.0),
    }
    assert mean_divergence([divergence_sums(batch, {})]) == pytest.approx(expected)
    numbers = replace(batch, phases=torch.tensor([0, 0, 1, 2, 1], dtype=torch.uint8))
    named = divergence_sums(numbers, {0: "text", 1: "code", 2: "number", 4: "answer"})
    assert mean_divergence([named]) == pytest.approx(expected | {"mismatch/kl_number": k3(-1.0)})
    text = replace(batch, segments=torch.zeros(5, dtype=torch.uint8))
    assert set(mean_divergence([divergence_sums(text, {})])) == {"mismatch/kl", "mismatch/kl_text"}
    assert mean_divergence([]) == {}
    for worst, where in ((0.3, "in text"), (0.36, None)):
        found = mismatch_in({"mismatch/kl": 0.1, "mismatch/kl_text": 0.35}, MismatchConfig(max_kl=worst))
        assert (found is None) if where is None else (found is not None and where in found)
    found = mismatch_in({"mismatch/kl": 0.1, "mismatch/kl_number": 0.4}, MismatchConfig(max_kl=0.3))
    assert found is not None and "0.4 nats a token in number" in found
    assert mismatch_in({"mismatch/kl": float("nan")}, MismatchConfig(max_kl=1e9)) is not None


def test_a_planted_mismatch_ends_the_run_before_the_update(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    honest = loop.run
    loop.run = lambda *a, **k: [[lie(r, 1.0) for r in group] for group in honest(*a, **k)]  # type: ignore[method-assign]
    config = replace(RL, mismatch=MismatchConfig(on_mismatch="abort", max_kl=0.1))
    with pytest.raises(MismatchError, match=r"differ by 0.368 nats a token over all .*max_kl \(0.1\).*Nothing was"):
        train_rl(model, processor, loop, endless(asked), config, scorer=RuleScorer(by_index))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), taught.parameters(), strict=True))
    assert not loop.engine.is_asleep


def test_a_planted_mismatch_is_warned_of(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], caplog: pytest.LogCaptureFixture
) -> None:
    _, metrics = run(taught, processor, sandbox, asked, RL, by=1.0)
    assert metrics["mismatch/kl"] == pytest.approx(np.exp(-1), rel=1e-3)  # ratio e^-1: 1 / e + 1 - 1
    assert [r.message for r in caplog.records if "differ by 0.368 nats a token over all" in r.message]
    caplog.clear()
    tight = replace(RL, mismatch=MismatchConfig(on_mismatch="abort", max_kl=0.0))
    _, metrics = run(taught, processor, sandbox, asked, tight, by=0.0)  # nothing to say of an honest engine
    assert metrics["mismatch/kl"] == metrics["mismatch/kl_text"] == 0.0
    assert not [r for r in caplog.records if "differ by" in r.message]


def test_bounds_that_leave_out_everything_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low: 1.5 must be in \[0, 1\]"):
        MismatchConfig(low=1.5)
    with pytest.raises(ValueError, match=r"high: 0.9 must be at least 1"):
        MismatchConfig(high=0.9)
