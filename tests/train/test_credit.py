"""Credit by branch, down to the token: each is trained once, with the advantage of what it decided."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.train.rl_material import group_of, hand_rollout
from thyme.model import Processor
from thyme.rollout.types import Parent, Rollout
from thyme.train.advantages import branch_advantages
from thyme.train.config import RlConfig
from thyme.train.policy_samples import policy_samples


def rollout(index: int, parent: Parent | None = None) -> Rollout:
    """Two given tokens, then two sampled ones in each of three rounds."""
    made = hand_rollout((1.0,) * 6, index=index, parent=parent)
    made.rounds = np.array([0, 0, 0, 0, 1, 1, 2, 2], dtype=np.int16)
    return made


PARENTS = [None, None, Parent(0, 1, 0), Parent(0, 2, 0)]
REWARDS = [1.0, 0.0, 3.0, 6.0]


def samples(processor: Processor, credit: Any, rewards: list[float] = REWARDS) -> list[Any]:
    group = group_of(*(rollout(i, parent) for i, parent in enumerate(PARENTS)), totals=rewards)
    return policy_samples(processor, [group], RlConfig(batch_size=1, credit=credit))


def test_each_token_is_trained_once_with_its_own_advantage(processor: Processor) -> None:
    credits = branch_advantages(REWARDS, [None, None, (0, 1), (0, 2)])
    found = samples(processor, "branch")
    trained = [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [6, 7]]
    for sample, tokens, of in zip(found, trained, credits, strict=True):
        assert np.flatnonzero(sample.weights).tolist() == tokens
        assert set(sample.weights[tokens].tolist()) == {np.float32(1 / 18)}  # a mean over the tokens that were drawn
        rounds = np.array([0, 0, 0, 0, 1, 1, 2, 2])
        for token in tokens:
            expected = [credit.advantage for credit in of if credit.round <= rounds[token]][-1]
            assert sample.advantages[token] == pytest.approx(expected)


def test_credit_by_group_trains_each_rollout_as_a_whole(processor: Processor) -> None:
    found = samples(processor, "group")
    assert all(np.flatnonzero(sample.weights).tolist() == [2, 3, 4, 5, 6, 7] for sample in found)
    assert len({float(sample.advantages[0]) for sample in found}) == 4


def test_what_has_no_advantage_anywhere_is_left_out(processor: Processor) -> None:
    """Equal rewards teach nothing; where only the last branch point has a spread, only what is above it stays."""
    assert samples(processor, "branch", [1.0] * 4) == []
    left = samples(processor, "branch", [2.0, 2.0, 2.0, 4.0])
    assert [sample.name.rsplit("/")[-1] for sample in left] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="credit: 'trunk' must be one of 'group', 'branch'"):
        replace(RlConfig(), credit="trunk")
