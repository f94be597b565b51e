"""Group advantages against values worked out by hand."""

import itertools
import math

import pytest
import torch

from thyme.train.advantages import branch_advantages, group_advantages, zero_spread


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


def normed(values: list[float]) -> list[float]:
    return group_advantages(torch.tensor([values], dtype=torch.float64))[0].tolist()


def test_credit_by_branch_of_a_tree_by_hand() -> None:
    """Two trunks; two branch off the first at round 2, one at round 1, and one off the first of these at round 3."""
    rewards = [1.0, 0.0, 3.0, 5.0, 2.0, 7.0]
    found = branch_advantages(rewards, [None, None, (0, 2), (0, 2), (0, 1), (2, 3)])
    third = normed([3.0, 7.0])  # what rollout 2 did from round 3 on, and rollout 5
    second = normed([1.0, 5.0, 5.0])  # rollouts 0, 2 (worth 5 by now) and 3
    value = (1.0 + 5.0 + 5.0) / 3
    first = normed([value, 2.0])
    root = normed([(value + 2.0) / 2, 0.0])
    expected = [
        [(0, root[0]), (1, first[0]), (2, second[0])],
        [(0, root[1])],
        [(2, second[1]), (3, third[0])],
        [(2, second[2])],
        [(1, first[1])],
        [(3, third[1])],
    ]
    for credits, of in zip(found, expected, strict=True):
        assert [credit.round for credit in credits] == [round for round, _ in of]
        assert [credit.advantage for credit in credits] == pytest.approx([advantage for _, advantage in of])


def test_credit_by_branch_without_branches_is_that_of_the_group() -> None:
    rewards = [0.0, 1.0, 1.0, 3.0]
    assert [of[0].advantage for of in branch_advantages(rewards, [None] * 4)] == normed(rewards)
    # One that branches off at a first round is a sibling of it.
    assert branch_advantages(rewards, [None, None, (0, 0), (2, 0)]) == branch_advantages(rewards, [None] * 4)
    at_two = branch_advantages(rewards, [None, (0, 2), (1, 2), (0, 2)])
    assert [of[-1].advantage for of in at_two] == normed(rewards) and at_two[0][0] == (0, 0.0)  # a root has no siblings
    with pytest.raises(ValueError, match="are no tree"):
        branch_advantages(rewards, [(1, 1), (0, 2), None, None])
    with pytest.raises(ValueError, match="1 parents for 4 rewards"):
        branch_advantages(rewards, [None])


def test_the_gradient_by_branch_is_unbiased() -> None:
    """Over all outcomes of a tree of coin flips, the expectation of credit times score is the gradient of the expected
    reward: of two siblings each is the other's baseline, up to the factor 1 / 2 that each loses to its own share in
    the mean, and there are two of them."""
    p = (0.3, 0.6)  # of a 1 in round 0, and in round 1
    gradient = [0.0, 0.0]

    def chance(which: int, bit: int) -> float:
        return p[which] if bit else 1 - p[which]

    def score(which: int, bit: int) -> float:
        return 1 / p[which] if bit else -1 / (1 - p[which])

    def reward(first: int, then: int) -> float:
        return 2.0 * first + 3.0 * then + 4.0 * first * then

    # A trunk's two rounds, the second round of what branches off it there, and another trunk's two rounds.
    for first, then, branched, other, last in itertools.product((0, 1), repeat=5):
        flips = [(0, first), (1, then), (1, branched), (0, other), (1, last)]
        weight = math.prod(chance(*flip) for flip in flips)
        rewards = [reward(first, then), reward(other, last), reward(first, branched)]
        trunk, second, branch = branch_advantages(rewards, [None, None, (0, 1)], "none")
        gradient[0] += weight * (trunk[0].advantage * score(0, first) + second[0].advantage * score(0, other))
        gradient[1] += weight * (trunk[1].advantage * score(1, then) + branch[0].advantage * score(1, branched))
    # The expected reward is 2 p0 + 3 p1 + 4 p0 p1.
    assert gradient == pytest.approx([2 + 4 * p[1], 3 + 4 * p[0]])
