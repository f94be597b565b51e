"""GRPO-ATS on the real engine and sandbox, in two steps, and its parts by hand."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.rl_material import ROLLOUT, by_index, group_of, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import Reward, RuleScorer
from thyme.rollout import RolloutConfig, read_rollouts
from thyme.rollout.types import Question, Rollout, RolloutStatus
from thyme.sandbox import Sandbox, SandboxResult, SnippetError, Status
from thyme.train.config import RlConfig
from thyme.train.distributed import World
from thyme.train.group_scores import ScoredGroup
from thyme.train.metrics import Metrics
from thyme.train.objective import AllowedIds, trained_logprobs
from thyme.train.packing import pack
from thyme.train.policy_samples import policy_samples, rollout_sample
from thyme.train.rl import train_rl
from thyme.train.rl_metrics import rollout_metrics, speculation_metrics

RL = RlConfig(steps=2, batch_size=2, warmup_steps=1, learning_rate=1e-3, record_steps=1)


def test_two_steps_on_engine_and_sandbox(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    history = train_rl(model, processor, loop, endless(asked), RL, scorer=RuleScorer(by_index), run_dir=tmp_path)
    assert len(history) == 2
    for metrics in history:
        assert metrics["actor/ratio"] == metrics["actor/ratio_max"] == 1.0
        assert metrics["reward/mean"] == 0.5 and metrics["reward/frac_zero_std"] == 0.0
        # Engine and trainer are one module on two paths: paged steps there, packed sequences here; the same bits.
        assert metrics["mismatch/kl"] == 0.0
        assert metrics["mismatch/ess"] == 1.0
        assert metrics["rollout/tool_calls"] > 0 and metrics["sandbox/success_rate"] > 0
        assert 0 < metrics["actor/greedy_frac"] < 1
        assert metrics["rollout/staleness_max"] == 0.0
        assert metrics["time/rollout"] > 0 and metrics["time/train"] > 0
    assert history[0]["actor/kl_ref"] == 0.0 < history[1]["actor/kl_ref"]
    assert loop.engine.weight_version == 2
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), taught.parameters(), strict=True)]
    assert all(moved)
    recorded = read_rollouts(tmp_path / "rollouts" / "step_1.jsonl")
    assert len(list(recorded)) == 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_came_of_guessed_tokens_is_measured_where_tokens_are_guessed(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    histories, stats = [], {}
    for speculation in ("off", "all"):
        model = copy.deepcopy(taught)
        loop = make_loop(model, sandbox, speculation)
        histories.append(train_rl(model, processor, loop, endless(asked), RL, scorer=RuleScorer(by_index)))
        stats = loop.engine.stats()
    plain, guessed = histories
    names = ("verifications", "drafted_tokens", "accepted_tokens")
    of_drafts = {f"rollout/{name}" for name in (*names, "tokens_per_verification")}
    assert all(not of_drafts & metrics.keys() for metrics in plain)
    for name in names:  # step by step, and nothing twice
        assert all(metrics[f"rollout/{name}"] > 0 for metrics in guessed)
        assert sum(metrics[f"rollout/{name}"] for metrics in guessed) == stats[name]
    for metrics, other in zip(guessed, plain, strict=True):
        assert metrics["rollout/accepted_tokens"] <= metrics["rollout/drafted_tokens"]
        ratio = metrics["rollout/accepted_tokens"] / metrics["rollout/verifications"]
        assert metrics["rollout/tokens_per_verification"] == 1 + ratio
        assert metrics["completion_length/mean"] == other["completion_length/mean"]


def test_a_step_in_which_nothing_was_guessed_has_no_ratio() -> None:
    stats = {"verifications": 3, "drafted_tokens": 8, "accepted_tokens": 6}
    zeros = {f"rollout/{name}": 0.0 for name in stats}
    assert speculation_metrics(stats, stats, World()) == zeros


def test_training_computes_the_log_probs_that_the_engine_recorded(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tolerances: dict
) -> None:
    """Bit for bit, in one packed batch and in one each, over the head's logits and fused with it."""
    groups = make_loop(taught, sandbox).run(asked, ROLLOUT.sampling(seed=1))
    samples = [rollout_sample(processor, rollout, 1.0) for group in groups for rollout in group]
    packs = [samples, *([sample] for sample in samples)]
    vocabulary = AllowedIds.of(processor)
    for packed in packs:
        (batch,) = pack(packed, image_token_id=processor.image_token_id)
        assert batch.rollout_logprobs is not None and batch.temperatures is not None
        assert {0.0, 1.0} <= set(batch.temperatures.tolist()) or len(packed) == 1
        same = replace(batch, same_bits=True)
        for fused_head in (False, True):
            with torch.no_grad():
                logprobs = trained_logprobs(taught, same, vocabulary, batch.temperatures, fused_head=fused_head)
            assert torch.equal(logprobs, batch.rollout_logprobs)
        # Without, attention rounds differently; this is how far that is.
        with torch.no_grad():
            logprobs = trained_logprobs(taught, batch, vocabulary, batch.temperatures, fused_head=False)
        atol, rtol = tolerances["logprob", torch.float32]
        torch.testing.assert_close(logprobs, batch.rollout_logprobs, atol=atol, rtol=rtol)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    config = RlConfig(steps=2, batch_size=2, learning_rate=1e-3, save_steps=1, record_steps=0)

    def train(resume_from: Path | None) -> tuple[Model, list[Metrics]]:
        model = copy.deepcopy(taught)  # the reference is the model it started from, resumed or not
        history = train_rl(
            model,
            processor,
            make_loop(model, sandbox),
            endless(asked),
            config,
            scorer=RuleScorer(by_index),
            run_dir=tmp_path,
            resume_from=resume_from,
        )
        return model, history

    whole, expected = train(None)
    resumed, history = train(tmp_path / "checkpoints" / "rl_1")
    assert [entry["loss"] for entry in history] == [expected[1]["loss"]]
    assert history[0]["actor/kl_ref"] == expected[1]["actor/kl_ref"] > 0
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]


def test_groups_without_spread_teach_nothing(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    def same(rollout: Rollout) -> Reward:
        return Reward(total=1.0, result=1.0, consistency=0.0, formatting=0.0)

    model = copy.deepcopy(taught)
    config = RlConfig(steps=1, batch_size=2, kl_coef=0.0)
    (metrics,) = train_rl(model, processor, make_loop(model, sandbox), endless(asked), config, scorer=RuleScorer(same))
    assert metrics["reward/frac_zero_std"] == 1.0 and metrics["loss"] == 0.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), taught.parameters(), strict=True))


def test_the_loop_must_run_the_model_that_is_trained(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    loop = make_loop(copy.deepcopy(taught), sandbox)
    with pytest.raises(ValueError, match="another model"):
        train_rl(taught, processor, loop, endless(asked), RL, scorer=RuleScorer(by_index))


def test_a_rollout_is_trained_where_the_policy_drew(processor: Processor) -> None:
    sample = rollout_sample(processor, hand_rollout(), advantage=2.0)
    assert sample.weights.tolist() == [0, 0, 1, 1]
    assert sample.rollout_logprobs is not None and sample.segments is not None and sample.advantages is not None
    # The sampled token is compared at its temperature, the greedy one at temperature 1.
    assert sample.rollout_logprobs[2:].tolist() == [-0.5, -0.75]
    assert sample.segments.tolist() == [0, 0, 0, 1]
    assert set(sample.advantages.tolist()) == {2.0}


def test_dead_groups_are_skipped_but_counted(processor: Processor) -> None:
    groups = [[hand_rollout(), hand_rollout()], [hand_rollout((1.0,)), hand_rollout((1.0,) * 3)]]
    scored = [group_of(*groups[0], totals=(1.0, 1.0)), group_of(*groups[1], totals=(0.0, 2.0))]
    samples = policy_samples(processor, scored, RlConfig())
    assert [np.count_nonzero(sample.weights) for sample in samples] == [1, 3]
    # Mean over the 4 tokens of the group, then over both groups.
    assert {float(weight) for sample in samples for weight in sample.weights if weight} == {1 / 8}
    samples = policy_samples(processor, scored, RlConfig(normalization="batch_tokens"))
    assert {float(weight) for sample in samples for weight in sample.weights if weight} == {1 / 8}  # of 8 tokens in all
    advantages = [float(sample.advantages[0]) for sample in samples if sample.advantages is not None]
    assert advantages == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)])


def test_a_group_without_rewards_is_as_if_it_had_not_been_asked(processor: Processor) -> None:
    rollouts = hand_rollout((1.0,)), hand_rollout((1.0,) * 3)
    scored = group_of(*rollouts, totals=(0.0, 2.0))
    failed = ScoredGroup(rollouts=[hand_rollout(), hand_rollout()], rewards=None)
    alone = policy_samples(processor, [scored], RlConfig())
    beside = policy_samples(processor, [failed, scored], RlConfig())
    assert [sample.weights.tolist() for sample in beside] == [sample.weights.tolist() for sample in alone]
    assert policy_samples(processor, [failed], RlConfig()) == []


def test_rollout_metrics_by_hand() -> None:
    ok = SandboxResult(status=Status.OK, wall_s=0.010)
    failed = SandboxResult(status=Status.ERROR, wall_s=0.030, error=SnippetError("ValueError", "no", 1))
    odd = SandboxResult(status=Status.ERROR, wall_s=0.020, error=SnippetError("not a name/x", "no", 1))
    groups = [
        [hand_rollout(result=ok), hand_rollout(result=failed)],
        [hand_rollout(status=RolloutStatus.LENGTH), hand_rollout((1.0,) * 6, result=odd)],
    ]
    metrics = rollout_metrics(groups, rollout_s=2.0, weight_version=3)
    assert metrics["completion_length/mean"] == 3.0
    assert metrics["completion_length/clipped_ratio"] == 0.25
    assert metrics["rollout/tool_calls"] == metrics["rollout/code_share"] == 0.75
    assert metrics["rollout/ended/length"] == 0.25 and metrics["rollout/ended/answered"] == 0.75
    assert metrics["sandbox/success_rate"] == pytest.approx(1 / 3)
    assert metrics["sandbox/error/ValueError"] == metrics["sandbox/error/other"] == pytest.approx(1 / 3)
    assert metrics["sandbox/exec_ms_p50"] == pytest.approx(20.0)
    assert metrics["perf/rollout_tok_per_s"] == 6.0
    assert metrics["rollout/staleness_mean"] == metrics["rollout/staleness_max"] == 3.0
    without_code = rollout_metrics([[hand_rollout()]], rollout_s=1.0, weight_version=0)
    assert not any(name.startswith("sandbox/") for name in without_code)


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2, "top_k": 20}], ids=str)
def test_truncated_rollouts_are_trained_as_they_were_drawn(
    cut: dict[str, float],
    taught: Model,
    processor: Processor,
    sandbox: Sandbox,
    asked: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine records log-probs over the ids it kept, and the trainer computes the same bits; not over all ids."""
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    loop.config = replace(ROLLOUT, **cut)  # type: ignore[arg-type]
    history = train_rl(model, processor, loop, endless(asked), RL, scorer=RuleScorer(by_index))
    for metrics in history:
        assert metrics["actor/ratio_max"] == metrics["mismatch/ess"] == 1.0
        assert metrics["mismatch/kl"] == 0.0
    assert history[0]["actor/kl_ref"] == 0.0
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), taught.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"has no logits to truncate: say rl\.fused_head false"):
        train_rl(model, processor, loop, endless(asked), replace(RL, fused_head=True), scorer=RuleScorer(by_index))
    monkeypatch.setattr(RolloutConfig, "truncates", False)
    loop = make_loop(model, sandbox)
    loop.config = replace(ROLLOUT, temperature=1.5, **cut)  # type: ignore[arg-type]
    (whole,) = train_rl(model, processor, loop, endless(asked), replace(RL, steps=1), scorer=RuleScorer(by_index))
    assert whole["mismatch/kl"] > 1e-4


def test_sampling_that_biases_log_probs_warns(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    assert not ROLLOUT.biases_logprobs
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    loop.config = replace(ROLLOUT, repetition_penalty=1.05)
    with pytest.warns(UserWarning, match="turn it off for RL"):
        train_rl(model, processor, loop, endless(asked), replace(RL, steps=1), scorer=RuleScorer(by_index))
