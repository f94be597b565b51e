"""Rollouts that a limit cut off: trained as any other, masked, or worth nothing."""

import copy
from dataclasses import replace

import pytest

from tests.train.rl_material import ROLLOUT, by_index, group_of, hand_rollout, make_loop
from thyme.model import Model, Processor
from thyme.rewards import RuleScorer
from thyme.rollout.types import Question, RolloutStatus
from thyme.sandbox import Sandbox
from thyme.train.batch_selection import spread
from thyme.train.config import RlConfig, Truncated
from thyme.train.policy_samples import policy_samples
from thyme.train.rl import train_rl

CUT = (RolloutStatus.LENGTH, RolloutStatus.CONTEXT, RolloutStatus.ABORTED)


def advantages_and_weights(
    processor: Processor, status: RolloutStatus, truncated: Truncated
) -> list[tuple[float, float]]:
    """Of a group that earned 2, 1, 0, of which the second ended so; two, three and one token long."""
    rollouts = [hand_rollout((1.0,) * n, index=i) for i, n in enumerate((2, 3, 1))]
    group = group_of(rollouts[0], replace(rollouts[1], status=status), rollouts[2], totals=(2.0, 1.0, 0.0))
    config = RlConfig(truncated=truncated, advantage_scale="none")
    samples = policy_samples(processor, [group], config)
    return [(float(s.advantages[0]), float(s.weights.max())) for s in samples if s.advantages is not None]


@pytest.mark.parametrize("status", CUT, ids=lambda status: status.value)
def test_each_rule_by_hand(processor: Processor, status: RolloutStatus) -> None:
    sixth, third = pytest.approx(1 / 6), pytest.approx(1 / 3)
    assert advantages_and_weights(processor, status, "train") == [(1.0, sixth), (0.0, sixth), (-1.0, sixth)]
    # In the baseline, which stays 1; not trained, so that the mean is over three tokens.
    assert advantages_and_weights(processor, status, "mask") == [(1.0, third), (0.0, 0.0), (-1.0, third)]
    # The baseline is 2 / 3.
    found = advantages_and_weights(processor, status, "zero")
    assert found == [(pytest.approx(4 / 3), sixth), (pytest.approx(-2 / 3), sixth), (pytest.approx(-2 / 3), sixth)]


@pytest.mark.parametrize("status", [s for s in RolloutStatus if s not in CUT], ids=lambda status: status.value)
def test_what_the_model_did_itself_is_no_truncation(processor: Processor, status: RolloutStatus) -> None:
    plain = advantages_and_weights(processor, RolloutStatus.ANSWERED, "train")
    for truncated in ("train", "mask", "zero"):
        assert advantages_and_weights(processor, status, truncated) == plain  # type: ignore[arg-type]


def test_the_spread_that_selects_is_that_of_what_counts() -> None:
    group = group_of(hand_rollout(), hand_rollout(status=RolloutStatus.LENGTH), totals=(0.0, 1.0))
    assert spread(group, RlConfig(truncated="train")) == spread(group, RlConfig(truncated="mask")) == 0.5
    assert spread(group, RlConfig(truncated="zero")) == 0.0


def test_a_run_of_each(taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]) -> None:
    """The better answer to the picture runs into the limit; how many tokens are trained tells the rules apart."""
    tokens = {}
    for truncated in ("train", "mask", "zero"):
        model = copy.deepcopy(taught)
        config = RlConfig(steps=1, batch_size=2, kl_coef=0.0, record_steps=0, truncated=truncated)  # type: ignore[arg-type]
        loop = make_loop(model, sandbox)
        loop.config = replace(ROLLOUT, max_tokens=36, max_tokens_per_round=36)
        (metrics,) = train_rl(model, processor, loop, lambda start, n: asked, config, scorer=RuleScorer(by_index))
        assert metrics["rollout/ended/length"] == 0.25 and metrics["reward/mean"] == 0.5  # as scored
        tokens[truncated] = metrics.get("batch/trained_tokens", 0.0)
    assert tokens["mask"] == tokens["train"] - 36
    assert 0 < tokens["zero"] < tokens["mask"]  # a group whose only winner was cut off has no spread left
