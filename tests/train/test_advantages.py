"""Group advantages against values worked out by hand."""

import pytest
import torch

from thyme.train.advantages import group_advantages, zero_spread


def test_hand_values() -> None:
    # Rewards 0 0 0 2: mean 0.5, squares 3 * 0.25 + 2.25 = 3, std with Bessel sqrt(3 / 3) = 1.
    advantages = group_advantages(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, -0.5, -0.5, 1.5]]) / 1.0001)
    # Two rollouts 1 and 0: mean 0.5, std sqrt(0.5).
    advantages = group_advantages(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[0.5, -0.5]]) / (0.5**0.5 + 1e-4))


def test_scale_none_is_the_centred_reward() -> None:
    torch.testing.assert_close(group_advantages(torch.tensor([[3.0, 1.0]]), scale="none"), torch.tensor([[1.0, -1.0]]))


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.rand(5, 4)
    both = group_advantages(rewards)
    for row in range(5):
        assert torch.equal(both[row : row + 1], group_advantages(rewards[row : row + 1]))


@pytest.mark.parametrize("value", [0.1, 1.7, 1e6])
def test_no_spread_is_exactly_zero(value: float) -> None:
    rewards = torch.full((2, 3), value)  # the float32 mean of three 0.1 is not 0.1
    assert torch.count_nonzero(group_advantages(rewards)) == 0
    assert zero_spread(rewards).tolist() == [True, True]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"\[questions, group\]"):
        group_advantages(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="'std' or 'none'"):
        group_advantages(torch.ones(1, 2), scale="mean")  # type: ignore[arg-type]
